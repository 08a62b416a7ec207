"""The finaliser of splitmix64: pseudo-random bits that depend on their key alone, the same on every rank.

Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014.
"""

from __future__ import annotations

from torch import Tensor

GAMMA = -0x61C8864680B583EB  # the increment of splitmix64's counter, as a signed integer


def mix(key: Tensor) -> Tensor:
    """A bijection of int64 that scatters neighbours (multiplication wraps)."""
    key = (key ^ shift_right(key, 30)) * -0x40A7B892E31B1A47
    key = (key ^ shift_right(key, 27)) * -0x6B2FB644ECCEEE15
    return key ^ shift_right(key, 31)


def shift_right(key: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; the tensor's own carries the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)

"""The checksum of weights: against the same sum in plain Python, and what it notices."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from megatron_ext.rollout import checksum
from megatron_ext.rollout.checksum import Checksum

WORD = 2**64


def digest(*named: tuple[str, Tensor], key: str = "key") -> str:
    found = Checksum(key)
    for name, value in named:
        found.add(name, value)
    return found.digest()


def mixed(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def plain(name: str, value: Tensor, key: str) -> str:
    described = f"{name} {value.dtype} {tuple(value.shape)}".encode()
    seed = int.from_bytes(hashlib.blake2b(described, key=key.encode(), digest_size=8).digest(), "big")
    data = bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist())
    total = seed
    for place in range(0, len(data), 8):
        word = int.from_bytes(data[place : place + 8], "little")
        total += mixed(word ^ mixed((place // 8 + seed) % WORD))
    return f"{total % WORD:016x}"


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_against_plain_python(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "BLOCK_BYTES", 64)
    value = (100 * torch.randn(shape)).to(dtype)
    assert digest(("w", value), key="k") == plain("w", value, "k")


def test_order_and_views_do_not_matter() -> None:
    one, two = torch.randn(7, 3), torch.randn(9).bfloat16()
    assert digest(("one", one), ("two", two)) == digest(("two", two), ("one", one))
    wide = torch.randn(7, 6)
    assert digest(("w", wide[:, 1:4])) == digest(("w", wide[:, 1:4].contiguous()))
    assert digest(("w", two[1:])) == digest(("w", two[1:].clone()))  # begins between two words


def test_every_bit_name_dtype_shape_place_and_key_matter() -> None:
    value = torch.randn(6, 4)
    right = digest(("w", value))
    for place in range(24):
        for bit in range(32):
            other = value.clone()
            other.view(torch.int32).view(-1)[place] ^= 1 << bit if bit < 31 else -(2**31)
            assert digest(("w", other)) != right
    swapped = value.view(-1).roll(2).view(6, 4)
    others = [("v", value), ("w", value.view(4, 6)), ("w", value.view(torch.int32)), ("w", swapped), ("w", -value)]
    assert right not in {digest(other) for other in others}
    assert digest(("w", value), key="other") != right
    assert digest(("w", value), ("w2", value)) != right


def test_it_begins_anew() -> None:
    found = Checksum("key")
    found.add("w", torch.randn(3))
    found.clear()
    found.add("w", torch.ones(3))
    assert found.digest() == digest(("w", torch.ones(3)))

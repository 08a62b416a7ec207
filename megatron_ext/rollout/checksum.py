"""A keyed checksum of named tensors, computed where they are: what was sent is compared with what arrived.

Each 8-byte word is mixed with its position and a key of its tensor, and all are added up: order and chunks of the
stream do not matter, every byte does. Who does not know the key cannot make other tensors of the same sum.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_ext.hashing import mix

BLOCK_BYTES = 2**25  # mixed at once: bounds the memory for it


class Checksum:
    """Of the tensors added so far."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._total = 0

    def clear(self) -> None:
        self._total = 0

    def add(self, name: str, value: Tensor) -> None:
        """Wait for ``value`` and count it in, with its name, dtype and shape."""
        described = f"{name} {value.dtype} {tuple(value.shape)}".encode()
        seed = int.from_bytes(
            hashlib.blake2b(described, key=self.key.encode(), digest_size=8).digest(), "big", signed=True
        )
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        total = torch.full((), seed, dtype=torch.int64, device=data.device)
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            words = pad(block, (0, -len(block) % 8)).clone().view(torch.int64)  # a copy begins where int64 may
            index = torch.arange(start // 8, start // 8 + len(words), device=data.device)
            total += mix(words ^ mix(index + seed)).sum()
        self._total += int(total)

    def digest(self) -> str:
        return f"{self._total % 2**64:016x}"

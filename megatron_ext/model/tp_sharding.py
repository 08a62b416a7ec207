"""How whole Hugging Face tensors become one Megatron parameter on each tensor-parallel rank, and back.

``shard`` only indexes the whole tensors, each once and with slices, so what it is given may read from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Sliceable(Protocol):
    """A tensor, or something that reads parts of one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


class TPSharding(Protocol):
    def shard(self, whole: Sequence[Sliceable], rank: int, size: int) -> Tensor: ...

    def join(self, parts: list[Tensor]) -> list[Tensor]: ...


class Replicated:
    """The same tensor on every rank."""

    def shard(self, whole: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return whole[0][:]

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0]]


@dataclass(frozen=True)
class Split:
    """Equal slices along ``dim``; several tensors (gate and up) are cut apart and stacked per rank."""

    dim: int
    num_tensors: int = 1

    def shard(self, whole: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        parts = [_part(tensor, self.dim, rank, size) for tensor in whole]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        stacked = [part.chunk(self.num_tensors, self.dim) for part in parts]
        return [torch.cat([rank[i] for rank in stacked], self.dim) for i in range(self.num_tensors)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, zero-padded to a multiple of the ranks."""

    vocab_size: int

    def shard(self, whole: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        width = -(-self.vocab_size // size)
        start, stop = (min(end * width, self.vocab_size) for end in (rank, rank + 1))
        rows = whole[0][start:stop]
        if len(rows) == width:
            return rows
        return torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts)[: self.vocab_size]]


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by key-value group, the order of Megatron's fused projection."""

    num_heads: int
    num_groups: int
    head_dim: int

    def shard(self, whole: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        own, rest = self.num_groups // size, whole[0].shape[1:]
        groups = [_part(tensor, 0, rank, size).reshape(own, -1, self.head_dim, *rest) for tensor in whole]
        return torch.cat(groups, 1).reshape(-1, *rest)

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        rest = parts[0].shape[1:]
        fused = torch.cat(parts).reshape(self.num_groups, -1, self.head_dim, *rest)
        query, key, value = fused.split([self.num_heads // self.num_groups, 1, 1], 1)
        return [x.reshape(-1, *rest) for x in (query, key, value)]


def _part(tensor: Sliceable, dim: int, rank: int, size: int) -> Tensor:
    width, remainder = divmod(tensor.shape[dim], size)
    assert remainder == 0, (tensor.shape, dim, size)
    return tensor[(*[slice(None)] * dim, slice(rank * width, (rank + 1) * width))]

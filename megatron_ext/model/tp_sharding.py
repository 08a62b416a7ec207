"""How full Hugging Face tensors become one Megatron parameter on each tensor-parallel rank, and back.

``shard`` gives a rank its shard of the full tensors, ``join`` makes the full tensors of all ranks' shards. ``shard``
only indexes what it is given, each tensor once and with slices, so that may read from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Sliceable(Protocol):
    """A tensor, or one in a file that is read where it is indexed."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


class TPSharding(Protocol):
    def shard(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor: ...

    def join(self, shards: list[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank."""

    def shard(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return full[0][:]

    def join(self, shards: list[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Equal slices along ``dim``; of several tensors (gate and up) a rank has its slices end to end."""

    dim: int
    num_tensors: int = 1

    def shard(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        slices = [_slice(tensor, self.dim, rank, size) for tensor in full]
        return slices[0] if len(slices) == 1 else torch.cat(slices, self.dim)

    def join(self, shards: list[Tensor]) -> list[Tensor]:
        by_rank = [shard.chunk(self.num_tensors, self.dim) for shard in shards]
        return [torch.cat([slices[i] for slices in by_rank], self.dim) for i in range(self.num_tensors)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, zero-padded to a multiple of the ranks."""

    vocab_size: int

    def shard(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        width = -(-self.vocab_size // size)
        start, stop = (min(end * width, self.vocab_size) for end in (rank, rank + 1))
        rows = full[0][start:stop]
        if len(rows) == width:
            return rows
        return torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])

    def join(self, shards: list[Tensor]) -> list[Tensor]:
        return [torch.cat(shards)[: self.vocab_size]]


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by key-value group, the order of Megatron's fused projection."""

    num_heads: int
    num_groups: int
    head_dim: int

    def shard(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        own, rest = self.num_groups // size, full[0].shape[1:]
        groups = [_slice(tensor, 0, rank, size).reshape(own, -1, self.head_dim, *rest) for tensor in full]
        return torch.cat(groups, 1).reshape(-1, *rest)

    def join(self, shards: list[Tensor]) -> list[Tensor]:
        rest = shards[0].shape[1:]
        fused = torch.cat(shards).reshape(self.num_groups, -1, self.head_dim, *rest)
        query, key, value = fused.split([self.num_heads // self.num_groups, 1, 1], 1)
        return [x.reshape(-1, *rest) for x in (query, key, value)]


def _slice(tensor: Sliceable, dim: int, rank: int, size: int) -> Tensor:
    width, remainder = divmod(tensor.shape[dim], size)
    assert remainder == 0, (tensor.shape, dim, size)
    return tensor[(*[slice(None)] * dim, slice(rank * width, (rank + 1) * width))]

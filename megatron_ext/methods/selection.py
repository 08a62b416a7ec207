"""Methods that choose some of a mini-batch's tokens, and the exact choice over data-parallel ranks.

Choices have to be equal on all tensor- and pipeline-parallel ranks and must not change with the layout. So a
"top k" is exactly k tokens of the whole mini-batch, ties included: they are broken by a key that belongs to
the token itself (``token_keys``), not to the place where a layout put it. A random choice is a choice by key.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.hashing import GAMMA, mix
from megatron_ext.methods.base import Needs, OneRank, Prepared, Reducer, Scope, num_valid
from megatron_ext.methods.grpo import GRPO
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class Selective(GRPO):
    """A method with a selection: over the mini-batch in ``prepare``, or (authors' codes) over each micro-batch.

    Named last among a method's bases, so that the others' defaults hold.
    """

    scope: Scope = "mini_batch"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, current=self.scope == "mini_batch")

    @abstractmethod
    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        """What the selection fixes for the loss. ``stats`` are the current policy's, without gradient.

        ``batch`` is a mini-batch, or with ``scope = "micro_batch"`` a part of one.
        """

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        prepared = super().prepare(batch, current, reduce)
        if self.scope == "micro_batch":
            return prepared
        assert current is not None
        return prepared | self.select(batch, current, prepared, reduce)

    def chosen(self, batch: Batch, stats: TokenStats, reduce: Reducer, name: str) -> Tensor:
        """Where the vector ``name`` of the selection is not 0, ``[T]`` bool: for ``selections``."""
        return self.select(batch, stats, Prepared(), reduce).token[name] != 0

    def loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        return super().loss(batch, stats, self.complete(batch, stats, prepared))

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        return super().metrics(batch, stats, self.complete(batch, stats, prepared))

    def complete(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Prepared:
        if self.scope == "mini_batch":
            return prepared
        return prepared | self.select(batch, stats.detach(), prepared, OneRank())

    def share(self, batch: Batch) -> float:
        """The weight of a mean over what ``select`` was given: 1, or a micro-batch's share of the sequences."""
        return 1.0 if self.scope == "mini_batch" else num_valid(batch) / max(batch.num_sequences, 1)


def count_of(ratio: float, num_tokens: int) -> int:
    """``ratio`` of the tokens, rounded down, but at least one."""
    return max(int(ratio * num_tokens), 1)


def top_k(value: Tensor, eligible: Tensor, count: int, key: Tensor, reduce: Reducer) -> Tensor:
    """Which tokens are among the ``count`` largest eligible ones over all ranks, ``[T]`` bool.

    Exactly ``count`` are chosen, or all eligible ones if there are fewer. Equal values go by ascending ``key``.
    """
    everyone = reduce.concat(eligible)
    values, keys = reduce.concat(value)[everyone], reduce.concat(key)[everyone]
    count = min(count, len(values))
    if count == 0:
        return torch.zeros_like(eligible)
    by_key = keys.argsort()
    last = by_key[values[by_key].argsort(descending=True, stable=True)[count - 1]]
    return eligible & ((value > values[last]) | ((value == values[last]) & (key <= keys[last])))


def covariance(logprob: Tensor, advantage: Tensor, among: Tensor, reduce: Reducer) -> Tensor:
    """``(logp - mean logp)(A - mean A)`` per token, ``[T]`` fp64; the means are over ``among`` on all ranks."""
    logprob, advantage = logprob.double(), advantage.double()
    columns = torch.stack([logprob, advantage, torch.ones_like(logprob)])
    total_logprob, total_advantage, count = reduce.sum(torch.where(among, columns, 0.0).sum(1))
    count = count.clamp(min=1)
    return (logprob - total_logprob / count) * (advantage - total_advantage / count)


def token_keys(batch: Batch, seed: int = 0) -> Tensor:
    """A pseudo-random int64 for each token, ``[T]``: which token of which response of which group it is, hashed.

    It does not depend on the rank or the place in the batch, as long as groups are whole and numbered over all ranks.
    """
    length = torch.bincount(batch.sequence, minlength=len(batch.reward))
    start = length.cumsum(0) - length
    position = torch.arange(len(batch.sequence), device=batch.sequence.device) - start[batch.sequence]
    member = (batch.group[:, None] == batch.group[None, :]).tril(-1).sum(1)  # how many of its group came before it
    key = torch.full_like(position, seed)
    for part in (batch.token(batch.group), batch.token(member), position):
        key = mix(key + part + GAMMA)
    return key

"""The contract of a method: what it needs, what it fixes before micro-batching, its loss per token.

A method is a page of functions on ``[T]`` vectors (see types.py). It imports torch and types, nothing
else: no process group, no Megatron. It sees other ranks only through the reducer it is handed.

The loss of a mini-batch is the plain sum over all tokens and all data-parallel ranks of what ``loss``
returns. Everything that depends on more than one token (counts, quantiles, means) is fixed in
``prepare`` and travels as ``[T]`` vectors, so that no split of the batch changes the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_ext.types import Batch, TokenStats

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Plan = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """The statistics a method asks of the operator. One fused call computes exactly these."""

    entropy: bool = False
    entropy_grad: bool = False
    nucleus_p: float | None = None
    nucleus: Literal["reach", "below"] = "reach"
    nucleus_grad: bool = False
    current: bool = False  # prepare() needs the statistics of the policy as it is before this mini-batch
    reference: bool = False  # log-probs of the reference model


class Reducer(Protocol):
    """The only door to the other data-parallel ranks."""

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over the ranks, same shape; identical bits on every rank."""
        ...

    def concat(self, value: Tensor) -> Tensor:
        """All ranks' ``[T]`` vectors in rank order, ``[sum of T]``."""
        ...


class OneRank:
    """The reducer of a single rank."""

    def sum(self, value: Tensor) -> Tensor:
        return value

    def concat(self, value: Tensor) -> Tensor:
        return value


@dataclass(kw_only=True)
class Method:
    """Base of all methods: options are dataclass fields, state goes through ``state_dict``."""

    aggregation: Aggregation = "token-mean"

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        """Advantage per sequence, ``[B]``. All members of a group are on one data-parallel rank."""
        raise NotImplementedError

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Plan:
        """Fix what depends on the whole mini-batch: ``[T]`` vectors that ``loss`` gets back per split.

        ``current`` holds the needed statistics of the current policy without gradient when
        ``needs.current`` is set, for the same tokens as ``batch``.
        """
        return {}

    def loss(self, batch: Batch, stats: TokenStats, plan: Plan) -> Tensor:
        """Loss per token ``[T]``, already weighted: the mini-batch's loss is its sum."""
        raise NotImplementedError

    def metrics(self, batch: Batch, stats: TokenStats, plan: Plan) -> dict[str, Tensor]:
        """Sums over the tokens of this split, without gradient, to be added over splits and ranks.

        The loop divides every value by ``num_tokens`` unless its name ends in ``_sum``.
        """
        return {}

    def after_step(self) -> dict[str, float]:
        """Advance controllers once per training step; returns their values for the step's metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state but the checkpoint holds {sorted(state)}: "
                "resume with the method that wrote it"
            )


def log_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """``log(pi / pi_old)``, clamped to +-20 so that one token cannot overflow the exponential."""
    return (logprob - old_logprob).clamp(-20.0, 20.0)


def group_statistics(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (ddof 1) and size of each sequence's group, ``[B]`` each.

    NaN rewards are left out of all three. A group of one has standard deviation 0.
    """
    valid = ~reward_B.isnan()
    value = torch.where(valid, reward_B, 0.0).double()
    _, index = torch.unique(group_B, return_inverse=True)
    zeros = value.new_zeros(int(index.max()) + 1 if len(index) else 0)
    size = zeros.index_add(0, index, valid.double())
    mean = zeros.index_add(0, index, value) / size.clamp(min=1)
    deviation = torch.where(valid, value - mean[index], 0.0)
    variance = zeros.index_add(0, index, deviation**2) / (size - 1).clamp(min=1)
    return mean[index].float(), variance.sqrt()[index].float(), size[index]

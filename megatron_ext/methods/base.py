"""The contract of a method: what it needs, what it fixes before micro-batching, its loss per token.

A method is a page of functions on ``[T]`` vectors (see types.py). It imports torch and types, nothing
else: no process group, no Megatron. It sees other ranks only through the reducer it is handed.

The loss of a mini-batch is the plain sum over all tokens and all data-parallel ranks of what ``loss``
returns. Everything that depends on more than one token (counts, quantiles, means) is fixed in
``prepare`` and travels as ``[T]`` vectors, so that no split of the batch changes the result.

The trainer calls a method's hooks in this order (train/step.py):

    compute_advantages   once a step, on all of its sampled responses
    on_step_start        once a step, before its first update: anchors are measured, controllers advance
    value_loss           with a critic: for every micro-batch of every mini-batch, before the policy's first update
    prepare              once a mini-batch, before it is split
    loss, metrics        once a micro-batch, on the last pipeline stage
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from megatron_ext.metric import Metric
from megatron_ext.types import Advantages, Batch, RolloutBatch, TokenStats

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Scope = Literal["mini_batch", "micro_batch"]  # what a statistic over tokens is taken over; mini_batch is over all ranks


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` fixes for one mini-batch: ``[T]`` vectors for ``loss``, and numbers to report."""

    token: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, float] = field(default_factory=dict)

    def select(self, position: Tensor) -> Prepared:
        """The part of a micro-batch whose tokens stand at ``position`` in the mini-batch."""
        return Prepared({name: value[position] for name, value in self.token.items()}, self.report)

    def __or__(self, other: Prepared) -> Prepared:
        return Prepared(self.token | other.token, self.report | other.report)


@dataclass(frozen=True)
class Needs:
    """The statistics a method asks of the operator. One fused call computes exactly these.

    Where a method asks for none of ``old``, ``current`` and ``value``, the step's first update measures its own
    mini-batch: before ``loss``, ``Batch.old_logprob`` of that mini-batch is then unknown (NaN). Needs stay the same
    within a step.
    """

    entropy: bool = False
    entropy_grad: bool = False
    nucleus_p: float | None = None
    nucleus: Literal["inclusive", "exclusive"] = "inclusive"
    nucleus_grad: bool = False
    min_p: float | None = None  # in the place of nucleus_p: tokens above this share of the likeliest one's probability
    min_p_grad: bool = False  # of their mass
    old: bool = False  # on_step_start() and Batch.old: statistics of the policy that sampled, before its first update
    current: bool = False  # prepare() needs the statistics of the policy as it is before this mini-batch
    reference: bool = False  # log-probs of the reference model
    value: bool = False  # a critic, trained beside the policy: its values before the step, value_loss() after it


@dataclass(frozen=True)
class Controller:
    """What a method that controls the entropy reports of it: names of metrics.

    ``target`` is a metric too, or a number of nats that stays. ``output`` is what the method moves, where it moves
    something, and ``bound`` the largest size that it can have.
    """

    measured: str
    target: str | float
    output: str | None = None
    bound: float | None = None


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
    """Base of all methods. Options are dataclass fields; fields with ``init=False`` are state, and are checkpointed."""

    aggregation: Aggregation = "token-mean"
    group_relative: ClassVar[bool] = False  # advantages are relative to the group: a group of one has none
    metrics_glossary: ClassVar[tuple[Metric, ...]] = ()  # what this page reports; a subclass names its own alone

    @classmethod
    def glossary(cls) -> tuple[Metric, ...]:
        """The descriptions of everything that the method may report, its parents' first."""
        return tuple(metric for page in reversed(cls.__mro__) for metric in vars(page).get("metrics_glossary", ()))

    @property
    def needs(self) -> Needs:
        return Needs()

    @property
    def controller(self) -> Controller | None:
        """How the method's control of the entropy is read from its metrics; None where it controls nothing."""
        return None

    @property
    def trains_on_wrong_rewards(self) -> bool:
        """Whether a wrong response's reward is its advantage, so that one of 0 would teach nothing."""
        return False

    @property
    def overlong(self) -> tuple[int, int] | None:
        """Lengths beyond which it lowers a response's reward, and at which by a whole 1; None where it lowers none."""
        return None

    @property
    def loss_moves_state(self) -> bool:
        """Whether ``loss`` changes the state, which the last pipeline stages alone call: the others are then told."""
        return False

    @property
    def updates_policy(self) -> bool:
        """Whether the policy is updated in this step, once ``on_step_start`` has seen it."""
        return True

    def policy_steps(self, steps: int) -> int:
        """In how many of the run's first ``steps`` steps it is."""
        return steps

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        """Advantage per sequence, ``[B]``. All members of a group are on one data-parallel rank."""
        raise NotImplementedError

    def rewards(self, rollouts: RolloutBatch) -> Tensor:
        """The reward that each response trains with, ``[B]``; NaN stays NaN."""
        return rollouts.reward

    def compute_advantages(self, rollouts: RolloutBatch, reduce: Reducer) -> Advantages:
        """The advantage of each token of this rank's whole step: here, that of its response."""
        return Advantages(rollouts.token(self.advantages(self.rewards(rollouts), rollouts.group)))

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        """See the whole step's batch under the policy that sampled it, before its first update.

        ``stats`` are given when ``needs.old`` is set, otherwise where they happen to be known. Here anchors are
        measured and controllers advance; what is returned goes into the step's metrics.
        """
        return {}

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        """Fix what depends on the whole mini-batch, before it is split into micro-batches.

        ``current`` holds the needed statistics of the current policy without gradient when
        ``needs.current`` is set, for the same tokens as ``batch``.
        """
        return Prepared()

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        """The tokens of a mini-batch that the method treats apart under the policy of ``stats``: name -> ``[T]`` bool.

        For analyses; the trainer does not ask. There are none where all tokens are treated alike.
        """
        return {}

    def loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        """Loss per token ``[T]``, already weighted: the mini-batch's loss is its sum."""
        raise NotImplementedError

    def value_loss(self, batch: Batch, value: Tensor) -> Tensor:
        """Loss of the critic's values ``[T]``, per token and weighted like ``loss``; asked for with ``needs.value``."""
        raise NotImplementedError

    def value_metrics(self, batch: Batch, value: Tensor) -> dict[str, Tensor]:
        """Sums over the tokens of this split, as in ``metrics``."""
        return {}

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        """Sums over the tokens of this split, to be added over splits and ranks.

        Names under ``loss/`` stay sums; all others are divided by the mini-batch's number of tokens.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {state.name: getattr(self, state.name) for state in fields(self) if not state.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when another method, or another version of this one, wrote ``state``."""
        own = sorted(self.state_dict())
        if sorted(state) != own:
            raise ValueError(
                f"{type(self).__name__} keeps {own or 'no state'} but the checkpoint holds {sorted(state) or 'none'}: "
                "resume with the method that wrote it"
            )
        for name, value in state.items():
            setattr(self, name, value)

    def check(self, name: str, valid: bool, expected: str) -> None:
        """Raises ValueError, naming the option, unless its value is valid."""
        if not valid:
            raise ValueError(f"{name}: found {getattr(self, name)!r}, expected {expected}")


def log_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """``log(pi / pi_old)``, clamped to +-20 so that one token cannot overflow the exponential."""
    return (logprob - old_logprob).clamp(-20.0, 20.0)


def token_mean(value: Tensor, mask: Tensor, reduce: Reducer) -> float:
    """Mean over the masked tokens of all ranks; 0 where there is none."""
    sums = torch.stack([torch.where(mask, value, 0.0).double().sum(), mask.double().sum()])
    total, count = reduce.sum(sums).tolist()
    return total / max(count, 1.0)


def num_selected(mask: Tensor, reduce: Reducer) -> int:
    """How many True ``mask`` holds on all ranks together."""
    return int(reduce.sum(mask.sum()))


def sequence_lengths(sequence: Tensor, mask: Tensor, num_sequences: int) -> Tensor:
    """Masked tokens of each sequence, ``[B]``."""
    return torch.bincount(sequence[mask], minlength=num_sequences)


def num_valid(batch: RolloutBatch) -> int:
    """Sequences of this batch or micro-batch that train."""
    return int((sequence_lengths(batch.sequence, batch.mask, len(batch.reward)) > 0).sum())


def kept_weights(
    aggregation: Aggregation, batch: Batch, kept: Tensor, *, num_tokens: float, num_sequences: int
) -> Tensor:
    """The aggregation's weights over the ``kept`` tokens alone, ``[T]``: ``num_tokens`` of ``num_sequences`` in all."""
    if aggregation == "token-mean":
        return kept / max(num_tokens, 1)
    if aggregation == "seq-mean-token-mean":
        length = sequence_lengths(batch.sequence, kept, len(batch.reward)).clamp(min=1)
        return kept / (batch.token(length) * max(num_sequences, 1))
    return kept * batch.weight * (batch.num_sequences / max(num_sequences, 1))


def shares(batch: RolloutBatch) -> Tensor:
    """Each token's part of this rank's sequences, ``[T]`` fp64: those of one sequence are equal, all add up to 1."""
    length = sequence_lengths(batch.sequence, batch.mask, len(batch.reward)).clamp(min=1).double()
    return batch.mask / batch.token(length * max(num_valid(batch), 1))


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


def quantile_by_sequence(value: Tensor, sequence: Tensor, mask: Tensor, q: float, num_sequences: int) -> Tensor:
    """The q-quantile (linear interpolation) of each sequence's valid values: ``[T] -> [B]``, 0 where none is valid."""
    value, sequence = value[mask], sequence[mask]
    by_value = value.argsort(stable=True)
    order = by_value[sequence[by_value].argsort(stable=True)]  # sorted within each sequence
    value = value[order]
    count = torch.bincount(sequence, minlength=num_sequences)
    start = count.cumsum(0) - count
    index = q * (count - 1).clamp(min=0).double()
    low = index.floor().long()
    high = (low + 1).minimum((count - 1).clamp(min=0))
    if not len(value):
        return value.new_zeros(num_sequences)
    at = lambda rank: value[(start + rank).clamp(max=len(value) - 1)]  # noqa: E731
    quantile = torch.lerp(at(low).double(), at(high).double(), index - low).to(value.dtype)
    return torch.where(count > 0, quantile, 0.0)

"""What the rooms of the repository hand to one another, and the one legend of shapes.

Shape suffixes (capital letters name logical axes):

    T   response tokens, packed: all tokens of sequence 0, then of sequence 1, ...
    B   sequences (responses) held by this data-parallel rank
    G   group size: responses sampled for one prompt
    V   vocabulary, padded to a multiple of the tensor-parallel size
    D   hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from megatron_ext.records import Problem, Reward

if TYPE_CHECKING:  # numpy comes with a run; the operator and the methods need torch alone
    import numpy as np

    from megatron_ext.kept_tokens import KeptTokens, PackedSupport


@dataclass(frozen=True)
class Sample:
    """One response of the rollout engine to one prompt.

    ``logprobs`` are the engine's own, of the distribution it sampled from, one per response token.
    ``weight_version`` counts the weight updates the engine had received when it sampled.
    ``support`` are the tokens that the sampler kept for each response token, where the engine tells.
    ``routing`` are the experts, from 0, of every token that the engine has read: prompt and response without the last
    token. ``[tokens, layers, top_k]``, whole numbers; of layers without experts they mean nothing. None: not told.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool
    weight_version: int
    support: KeptTokens | None = field(default=None, compare=False)
    routing: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Episode:
    """A sample with its problem and its reward: what a training step consumes."""

    problem: Problem
    group: int
    sample: Sample
    reward: Reward


@dataclass(frozen=True)
class TokenStats:
    """Statistics of one policy at the response tokens, fp32 ``[T]``, natural-log units.

    Every value belongs to the distribution at the rollout temperature. Fields nobody asked for are None. Under sampling
    replay ``logprob`` is that of the policy renormalised on the tokens that the sampler kept, ``support_size`` their
    number, and ``outside_support`` 1 where the sampled token was not among them; entropies are the whole policy's.
    ``min_p_mass`` is the whole policy's probability of the tokens above a share of the likeliest one's, and
    ``min_p_logprob`` that of the sampled token renormalised on them, minus infinity where it is not one of them.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    nucleus_mass: Tensor | None = None
    nucleus_size: Tensor | None = None
    min_p_mass: Tensor | None = None
    min_p_logprob: Tensor | None = None
    support_size: Tensor | None = None
    outside_support: Tensor | None = None

    def detach(self) -> TokenStats:
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        """Apply ``function`` to every field that is present."""
        return TokenStats(**{name: function(value) for name, value in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


OF_MIN_P = {"nucleus_mass": "min_p_mass", "nucleus_logprob": "min_p_logprob"}
"""The operator's outputs over the tokens that min_p keeps, which are its nucleus then -> the fields of TokenStats."""


@dataclass(frozen=True)
class ContextSplit:
    """Which context-parallel ranks have the response tokens of a micro-batch: the way from each rank's to all."""

    counts: tuple[int, ...]  # response tokens of each rank
    order: Tensor  # [T] int64, where each token stands in the ranks' tokens, one rank after the other


@dataclass(frozen=True)
class PackedSequences:
    """One micro-batch for the model: prompts and responses end to end, S tokens in all.

    A response's last token predicts nothing and is left out. Responses may share a prompt: then a tree is the prompt
    and after it all of its responses, each a branch that sees the prompt and itself. Else it is one sequence.
    ``logit_positions`` are those whose logits predict a response token, ``targets`` those tokens, both ``[T]``
    in the order of the sequences.

    Under context parallelism it is one rank's part (model/zigzag.py): S and T count that rank's tokens alone, all
    but ``starts``, ``response_lengths`` and ``context``, which are of the whole micro-batch.
    """

    tokens: Tensor  # [S] int64
    position: Tensor  # [S] int64, within the sequence
    starts: Tensor  # [trees + 1] int32, cumulative lengths
    logit_positions: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    response_lengths: tuple[int, ...]  # one per sequence, without the padding
    support: PackedSupport | None = None  # under sampling replay
    routing: Tensor | None = None  # [S, layers, top_k] int16, experts of the engine; -1: not told. None: of no token
    branch: Tensor | None = None  # [S] int64, a response's number in its tree, from 1; 0: the prompt. None: no sharing
    context: ContextSplit | None = None  # None: it is whole


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """Sampled responses with what the models say about their tokens, on one data-parallel rank, before any update."""

    PER_TOKEN: ClassVar = ("mask", "old_logprob", "rollout_logprob", "ref_logprob", "old_value", "importance")
    PER_SEQUENCE: ClassVar = ("reward", "group", "truncated")

    sequence: Tensor  # [T] int64, index of the token's sequence, non-decreasing
    mask: Tensor  # [T] bool, tokens that train
    old_logprob: Tensor  # [T] fp32, recomputed by the trainer before the first update, or in it (NaN until then)
    rollout_logprob: Tensor  # [T] fp32, reported by the engine
    ref_logprob: Tensor | None  # [T] fp32, of the reference model, when the method needs it
    reward: Tensor  # [B] fp32
    group: Tensor  # [B] int64
    truncated: Tensor  # [B] bool
    old_value: Tensor | None = None  # [T] fp32, of the critic before the first update, when the method needs it
    importance: Tensor | None = None  # [T] fp32, weight of the policy loss (train/mismatch.py); None: 1 everywhere
    old: TokenStats | None = None  # of the policy that sampled, before the first update, when the method needs them

    def token(self, value_B: Tensor) -> Tensor:
        """``[B] -> [T]``: each token's value of its sequence."""
        return value_B[self.sequence]

    def corrected(self, policy_loss: Tensor) -> Tensor:
        """``[T]``: the policy loss as if the tokens had been sampled from the trainer's old policy."""
        return policy_loss if self.importance is None else self.importance * policy_loss

    def select(self, index: Sequence[int]) -> tuple[Self, Tensor]:
        """The given sequences, in the given order, and the positions ``[T']`` of their tokens here."""
        device = self.reward.device
        order = torch.tensor(index, dtype=torch.int64, device=device)
        length = torch.bincount(self.sequence, minlength=len(self.reward))
        shift = (length.cumsum(0) - length)[order] - (length[order].cumsum(0) - length[order])
        position = torch.repeat_interleave(shift, length[order])
        position += torch.arange(len(position), device=device)
        renumber = torch.empty(len(self.reward), dtype=torch.int64, device=device)
        renumber[order] = torch.arange(len(index), device=device)
        per_token = {name: getattr(self, name) for name in self.PER_TOKEN}
        selected = {name: None if value is None else value[position] for name, value in per_token.items()}
        selected |= {name: getattr(self, name)[order] for name in self.PER_SEQUENCE}
        old = None if self.old is None else self.old.map(lambda value: value[position])
        return replace(self, sequence=renumber[self.sequence[position]], old=old, **selected), position

    def complete(self, advantages: Advantages, *, weight: Tensor, num_sequences: int, num_tokens: int) -> Batch:
        """The batch that a method trains on."""
        return Batch(
            **{field.name: getattr(self, field.name) for field in fields(self)},
            advantage=advantages.advantage,
            returns=advantages.returns,
            weight=weight,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )


@dataclass(frozen=True)
class Advantages:
    """How much better than expected each response token is, fp32 ``[T]``; ``returns`` are what a critic learns."""

    advantage: Tensor
    returns: Tensor | None = None

    def select(self, position: Tensor) -> Advantages:
        """The advantages of the tokens at ``position``."""
        return Advantages(self.advantage[position], None if self.returns is None else self.returns[position])


@dataclass(frozen=True, kw_only=True)
class Batch(RolloutBatch):
    """What a method trains on: a step, a mini-batch or a micro-batch of it, on one data-parallel rank.

    ``weight`` is the aggregation, fixed from counts over the whole mini-batch and all data-parallel
    ranks before it is split, so the loss is ``sum(weight * loss)`` over any split of the tokens
    (train/token_weights.py). It is 0 wherever ``mask`` is False.
    ``num_sequences`` and ``num_tokens`` count the whole mini-batch over all data-parallel ranks.
    """

    PER_TOKEN: ClassVar = (*RolloutBatch.PER_TOKEN, "weight", "advantage", "returns")

    weight: Tensor  # [T] fp32
    advantage: Tensor  # [T] fp32
    num_sequences: int
    num_tokens: int
    returns: Tensor | None = None  # [T] fp32, what the critic learns

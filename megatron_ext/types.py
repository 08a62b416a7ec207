"""What the rooms of the repository hand to one another, and the one legend of shapes.

Shape suffixes (capital letters name logical axes):

    T   response tokens, packed: all tokens of sequence 0, then of sequence 1, ...
    B   sequences (responses) held by this data-parallel rank
    G   group size: responses sampled for one prompt
    V   vocabulary, padded to a multiple of the tensor-parallel size
    D   hidden size
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_ext.records import Problem, Reward


@dataclass(frozen=True)
class Sample:
    """One response of the rollout engine to one prompt.

    ``logprobs`` are the engine's own, at the sampling temperature, one per response token.
    ``weight_version`` counts the weight updates the engine had received when it sampled.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool
    weight_version: int


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

    Every value belongs to the distribution at the rollout temperature. Fields nobody asked for are None.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    nucleus_mass: Tensor | None = None
    nucleus_size: Tensor | None = None

    def detach(self) -> TokenStats:
        return self.map(Tensor.detach)

    def map(self, function) -> TokenStats:
        """Apply ``function`` to every field that is present."""
        return TokenStats(**{name: function(value) for name, value in self.present().items()})

    def present(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class PackedSequences:
    """One micro-batch for the model: prompts and responses end to end, S tokens in all.

    ``logit_positions`` are those whose logits predict a response token, ``targets`` those tokens, both ``[T]``
    in the order of the sequences.
    """

    tokens: Tensor  # [S] int64
    position: Tensor  # [S] int64, within the sequence
    starts: Tensor  # [sequences + 1] int32, cumulative lengths
    logit_positions: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    response_lengths: tuple[int, ...]  # one per sequence, without the padding


@dataclass(frozen=True)
class Batch:
    """The response tokens of one mini-batch (or of a micro-batch of it) on one data-parallel rank.

    ``weight`` is the aggregation, fixed from counts over the whole mini-batch and all data-parallel
    ranks before it is split, so the loss is ``sum(weight * loss)`` over any split of the tokens
    (train/token_weights.py). It is 0 wherever ``mask`` is False.
    ``num_sequences`` and ``num_tokens`` count the whole mini-batch over all data-parallel ranks.
    """

    sequence: Tensor  # [T] int64, index of the token's sequence, non-decreasing
    mask: Tensor  # [T] bool, tokens that train
    weight: Tensor  # [T] fp32
    old_logprob: Tensor  # [T] fp32, recomputed by the trainer before the first update, or in it (NaN until then)
    rollout_logprob: Tensor  # [T] fp32, reported by the engine
    ref_logprob: Tensor | None  # [T] fp32, of the reference model, when the method needs it
    advantage: Tensor  # [T] fp32
    reward: Tensor  # [B] fp32
    group: Tensor  # [B] int64
    truncated: Tensor  # [B] bool
    num_sequences: int
    num_tokens: int
    old_value: Tensor | None = None  # [T] fp32, of the critic before the first update, when the method needs it
    returns: Tensor | None = None  # [T] fp32, what the critic learns
    importance: Tensor | None = (
        None  # [T] fp32, weight of the policy loss against the engine's draw (train/mismatch.py)
    )

    def token(self, value_B: Tensor) -> Tensor:
        """``[B] -> [T]``: each token's value of its sequence."""
        return value_B[self.sequence]

    def corrected(self, policy_loss: Tensor) -> Tensor:
        """``[T]``: the policy loss as if the tokens had been drawn from the trainer's old policy."""
        return policy_loss if self.importance is None else self.importance * policy_loss

    def select(self, index: list[int]) -> tuple[Batch, Tensor]:
        """The given sequences, in the given order, and the positions ``[T']`` of their tokens here."""
        device = self.reward.device
        order = torch.tensor(index, dtype=torch.int64, device=device)
        places = [torch.nonzero(self.sequence == sequence)[:, 0] for sequence in index]
        position = torch.cat([self.sequence.new_empty(0), *places])
        renumber = torch.empty(len(self.reward), dtype=torch.int64, device=device)
        renumber[order] = torch.arange(len(index), device=device)
        token = {
            name: None if value is None else value[position] for name in _PER_TOKEN for value in [getattr(self, name)]
        }
        sequence = {name: getattr(self, name)[order] for name in ("reward", "group", "truncated")}
        return replace(self, sequence=renumber[self.sequence[position]], **token, **sequence), position


_PER_TOKEN = (  # fields of a Batch besides ``sequence``
    *("mask", "weight", "old_logprob", "rollout_logprob", "ref_logprob"),
    *("advantage", "old_value", "returns", "importance"),
)

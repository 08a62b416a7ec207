"""Controllers of the entropy: what the pages of several of them share.

A clip range whose upper bound moves while the policy trains, and a target that is the entropy of the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared, Reducer, log_ratio, token_mean
from megatron_ext.methods.grpo import GRPO
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class MovingClip(GRPO):
    """GRPO on [1 - clip_low, 1 + high]: ``high`` begins as ``clip_high``, and a controller moves it.

    Named last among a method's bases, so that the others' defaults hold.
    """

    high: float = field(default=0.0, init=False)  # in force

    def __post_init__(self) -> None:
        super().__post_init__()
        self.high = self.clip_high

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        advantage = self.advantage(batch, stats, prepared)
        ratio = log_ratio(stats.logprob, batch.old_logprob).exp()
        loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip_low, 1 + self.high))
        if self.dual_clip is not None:
            loss = torch.where(advantage < 0, torch.min(loss, -advantage * self.dual_clip), loss)
        return batch.corrected(loss)

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        own, advantage = super().metrics(batch, stats, prepared), self.advantage(batch, stats, prepared)
        ratio = log_ratio(stats.logprob, batch.old_logprob).exp()
        return own | {"clip/high": (batch.mask & (advantage > 0) & (ratio > 1 + self.high)).sum()}


@dataclass(kw_only=True)
class KeepsEntropy(GRPO):
    """Measures the entropy of every step, and takes that of the first one as its target."""

    target: float | None = None  # nats
    h_0: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("target", self.target is None or self.target > 0, "an entropy above 0, in nats, or leave it out")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, old=True, entropy=True)

    def measure(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> tuple[float, float]:
        """The step's entropy, and the target."""
        assert stats is not None and stats.entropy is not None
        entropy = token_mean(stats.entropy, batch.mask, reduce)
        if self.h_0 is None:
            self.h_0 = entropy
        return entropy, self.h_0 if self.target is None else self.target

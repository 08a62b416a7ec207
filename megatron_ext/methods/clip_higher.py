"""Clip-Higher, and overlong shaping: the parts of DAPO that live in the loss (arXiv 2503.14476).

A clip range with equal bounds lets a likely token grow a lot and an unlikely one hardly at all, so entropy collapses.
A wider upper bound leaves unlikely tokens with a positive advantage room to grow; with equal bounds this is GRPO.

    L = (1/N) sum_t max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  clip_low .2 < clip_high .28

N counts the tokens of the mini-batch over all ranks (token-mean). DAPO's rewards are +-1.

Overlong shaping (an option: set ``overlong_max``, Lmax, to the longest response, 20480 in the paper) lowers the
reward of a response of more than Lmax - Lbuf tokens before its group is normalised, Lbuf = ``overlong_buffer``:

    R_i <- R_i + min(-(|o_i| - (Lmax - Lbuf)) / Lbuf, 0)

Its only statistics are those of the groups.

Differs from the authors' code: there a micro-batch's loss is the mean over its own tokens; here a token counts
the same in every split. Dynamic sampling, DAPO's other part, is ``rollout.dynamic_sampling``
(train/collect_rollouts.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation, Reducer, num_selected
from megatron_ext.methods.grpo import GRPO
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, RolloutBatch, TokenStats


@dataclass(kw_only=True)
class ClipHigher(GRPO):
    aggregation: Aggregation = "token-mean"
    clip_high: float = 0.28
    overlong_max: int | None = None
    overlong_buffer: int = 4096
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="overlong/share", section="Responses", title="Overlong", unit="share of responses",
            meaning="responses that overlong shaping penalises",
            good="falls",
            high="responses grow into the limit: see response/truncated"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("overlong_buffer", self.overlong_buffer >= 1, "a number of tokens of at least 1")
        if self.overlong_max is not None:
            at_least = f"at least overlong_buffer = {self.overlong_buffer}, or leave it out"
            self.check("overlong_max", self.overlong_max >= self.overlong_buffer, at_least)

    def rewards(self, rollouts: RolloutBatch) -> Tensor:
        return super().rewards(rollouts) + self.penalty(rollouts)

    @property
    def overlong(self) -> tuple[int, int] | None:
        return None if self.overlong_max is None else (self.overlong_max - self.overlong_buffer, self.overlong_max)

    def penalty(self, rollouts: RolloutBatch) -> Tensor:
        """What overlong shaping adds to each response's reward, ``[B]``, at most 0."""
        if self.overlong is None:
            return torch.zeros_like(rollouts.reward)
        excess = torch.bincount(rollouts.sequence, minlength=len(rollouts.reward)) - self.overlong[0]
        return (-excess / self.overlong_buffer).clamp(max=0.0)

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        report = super().on_step_start(batch, stats, reduce)
        if self.overlong_max is None:
            return report
        shaped = num_selected((self.penalty(batch) < 0) & ~batch.reward.isnan(), reduce)
        return report | {"overlong/share": shaped / max(batch.num_sequences, 1)}

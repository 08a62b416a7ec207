"""ERC: entropy ratio clipping, no update of tokens whose entropy moves too far (arXiv 2512.05591, section 3).

A clip range bounds the probability of the sampled token alone; all other tokens of the vocabulary may move at will, and
entropy and gradients then fluctuate. ERC also asks how far the entropy of the whole distribution has moved since the
sampling, and takes the tokens at which it has moved too far, either way, out of the update.

    rho_t = H_t / H_old_t
    I_t   = [ratio_low < rho_t < ratio_high]
    L     = (1/N) sum_t I_t max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high))

H_t is the full-vocabulary entropy of the current policy, a constant here, and H_old_t that of the policy that sampled,
before the step's first update. .95 and 1.05 on DAPO's clip range, .2 / .28. The denominator N stays all tokens of the
mini-batch over all ranks: stopped tokens count, and keep the value of their loss. At the first update of a step rho is
exactly 1: ERC acts from the second one on, where about one token in five is stopped in the paper.

``preserve = true`` puts ERC on GPPO (ERC-GPPO), whose tokens beyond the clip range keep a bounded gradient
(ce_gppo.py): beta_1 = beta_2 = 1 there, and the authors' runs of it have ``clip_high = 0.2``. There is no statistic: a
token's ratio is its own.

Differs from the authors' code, which bounds the loss of negative advantages too: ``dual_clip = 10.0``. From it are the
1e-8 added to both entropies, so that a token certain before and after has ratio 1. Its runs add .1 times the negative
log-likelihood of right responses: not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.methods import surrogates
from megatron_ext.methods.base import Needs, Prepared
from megatron_ext.methods.ce_gppo import CEGPPO
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class ERC(CEGPPO):
    clip_high: float = 0.28
    beta_1: float = 1.0
    ratio_low: float = 0.95
    ratio_high: float = 1.05
    preserve: bool = False
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="erc/stopped", section="Entropy", title="Selected tokens", unit="share of tokens", short="stopped",
            meaning="tokens whose entropy has left the range around what it was when they were sampled: not updated",
            good="0 where a step has one update; about .2 in the paper",
            high="the policy moves far in one step: lower optimizer.lr or the number of updates per step"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("ratio_low", 0 <= self.ratio_low < 1, "a ratio from 0 to below 1")
        self.check("ratio_high", self.ratio_high > 1, "a ratio above 1")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, old=True, entropy=True)

    def stopped(self, batch: Batch, stats: TokenStats) -> Tensor:
        """Where the entropy has moved too far, ``[T]`` bool."""
        assert stats.entropy is not None and batch.old is not None and batch.old.entropy is not None
        ratio = (stats.entropy.detach() + 1e-8) / (batch.old.entropy + 1e-8)
        return ~((ratio > self.ratio_low) & (ratio < self.ratio_high))

    @property
    def is_surrogate(self) -> bool:
        return self.preserve

    @property
    def ppo_surrogate(self) -> surrogates.PPO:
        return super().ppo_surrogate if self.preserve else super(CEGPPO, self).ppo_surrogate

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        loss = super().policy_loss(batch, stats, prepared)
        return torch.where(self.stopped(batch, stats), loss.detach(), loss)

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        stopped = batch.mask & self.stopped(batch, stats)
        return super().metrics(batch, stats, prepared) | {"erc/stopped": stopped.sum()}

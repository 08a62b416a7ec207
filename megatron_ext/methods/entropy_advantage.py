"""Entropy advantage: reasoning with exploration (arXiv 2506.14758, section 3).

Tokens of high entropy go along with exploratory reasoning (pivotal words, self-checks, rare behaviour), but the
advantage of a response does not tell them apart. This adds a small, bounded share of each token's entropy to it.

    psi_t = min(alpha * sg(H_t), |A_t| / kappa)
    A'_t  = A_t + psi_t
    L     = (1/N) sum_t max(-A' r, -A' clip(r, 1 - clip_low, 1 + clip_high)),  clip .2 / .28, no KL

psi is added to negative advantages too, after the group normalisation, and nothing is normalised afterwards. With
kappa > 1 it never turns a sign, and where A is 0 psi is 0. H_t is the full-vocabulary entropy of the current policy,
a constant. The paper's rewards are +-1; kappa is 2, alpha .4 on GRPO. SIREN's copy has kappa 1.

On PPO (``entropy_advantage_ppo``) A is the whitened advantage of the critic (ppo.py) and alpha .1.

There is no statistic: every split and layout gives the same loss. No code of the authors was found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.ppo import PPO
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class EntropyAdvantage(ClipHigher):
    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("alpha", self.alpha >= 0, "a number of at least 0")
        self.check("kappa", self.kappa >= 1, "a number of at least 1: below it psi could turn the advantage's sign")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True)

    def advantage(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        assert stats.entropy is not None
        advantage = super().advantage(batch, stats, prepared)
        return advantage + psi(stats.entropy, advantage, alpha=self.alpha, kappa=self.kappa)


@dataclass(kw_only=True)
class PPOEntropyAdvantage(EntropyAdvantage, PPO):
    alpha: float = 0.1


def psi(entropy: Tensor, advantage: Tensor, *, alpha: float, kappa: float) -> Tensor:
    """``min(alpha sg(H), |A| / kappa)`` per token."""
    return torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)

"""GRPO: group-relative policy optimisation (arXiv 2402.03300; eq. 3 of SIREN, arXiv 2509.25133).

    A_i = (R_i - mean(R of the group)) / (std(R of the group) + 1e-6),  std with ddof 1
    r_t = exp(logp_t - logp_old_t)
    L   = mean_i mean_t [ max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + beta * k3 ]
    k3  = exp(ref - logp) - (ref - logp) - 1,  clamped to +-10

A group of one and a group with equal rewards have A = 0. ``aggregation = "token-mean"`` divides by all
tokens of the mini-batch instead (verl's default). ``dual_clip = c`` bounds the loss of negative advantages
by -c A (off by default; verl has it silently on with c = 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation, Method, Needs, Plan, group_statistics, log_ratio
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class GRPO(Method):
    aggregation: Aggregation = "seq-mean-token-mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0  # coefficient of the KL to the reference model
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a number of at least 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: found {self.dual_clip}, expected a number above 1, or leave it out")

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.beta > 0)

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        mean, std, _ = group_statistics(reward_B, group_B)
        advantage = (reward_B - mean) / (std + 1e-6)
        return torch.where((std == 0) | reward_B.isnan(), 0.0, advantage)

    def loss(self, batch: Batch, stats: TokenStats, plan: Plan) -> Tensor:
        loss = self.policy_loss(batch, stats)
        if self.beta > 0:
            assert batch.ref_logprob is not None
            loss = loss + self.beta * k3(stats.logprob, batch.ref_logprob)
        return batch.weight * loss

    def policy_loss(self, batch: Batch, stats: TokenStats) -> Tensor:
        """The clipped objective per token, unweighted, ``[T]``."""
        advantage = batch.token(batch.advantage)
        ratio = log_ratio(stats.logprob, batch.old_logprob).exp()
        loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip_low, 1 + self.clip_high))
        if self.dual_clip is not None:
            loss = torch.where(advantage < 0, torch.min(loss, -advantage * self.dual_clip), loss)
        return loss

    def metrics(self, batch: Batch, stats: TokenStats, plan: Plan) -> dict[str, Tensor]:
        advantage = batch.token(batch.advantage)
        ratio = log_ratio(stats.logprob, batch.old_logprob).exp()
        return {
            "loss/policy": (batch.weight * self.policy_loss(batch, stats)).sum(),
            "clip/low": (batch.mask & (advantage < 0) & (ratio < 1 - self.clip_low)).sum(),
            "clip/high": (batch.mask & (advantage > 0) & (ratio > 1 + self.clip_high)).sum(),
            "kl/old": torch.where(batch.mask, k3(stats.logprob, batch.old_logprob), 0.0).sum(),
        }


def k3(logprob: Tensor, other: Tensor) -> Tensor:
    """The low-variance estimate of KL(policy || other) at sampled tokens, clamped to +-10."""
    difference = log_ratio(other, logprob)
    return (difference.exp() - difference - 1).clamp(-10.0, 10.0)

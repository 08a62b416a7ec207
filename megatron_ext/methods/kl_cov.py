"""KL-Cov: a penalty on the tokens of highest covariance (arXiv 2505.22617, section 4).

Entropy falls most by few tokens: those that are both likely and of high advantage (a high covariance) are pushed up
again and again. KL-Cov lets them learn, but holds them near the policy before the step by a penalty.

    Cov_t = (logp_t - mean logp)(A_t - mean A)             means over all N valid tokens
    K     = the max(int(k N), 1) tokens of highest Cov
    L     = (1/N) [ sum_t -A r_t  +  kl_coef * sum_{t in K} |logp_t - logp_old_t| ]

logp is the current policy's. Nothing is clipped, unless another ``surrogate`` than ppo does it. At the first update of
a step r == 1, exactly: there the penalty has no gradient, so KL-Cov acts only from the second update on. k is .002 for
7B and .0002 for 32B in the paper.

``kl = "abs"`` is the absolute log-ratio of the authors' code. SENT (arXiv 2512.04359, appendix C.6) writes
KL(old || pi) in its place: ``kl = "k3"`` estimates it by r_t - 1 - log r_t, clamped to +-10, whose mean under the old
policy it is.

Scope. Means, N and K are over the whole mini-batch on all ranks; ``scope = "micro_batch"``, as in the authors'
code: each micro-batch its own, at least one token each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.methods import surrogates
from megatron_ext.methods.base import Aggregation, Prepared, Reducer, log_ratio, num_selected
from megatron_ext.methods.grpo import k3
from megatron_ext.methods.selection import Selective, count_of, covariance, token_keys, top_k
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class KLCov(Selective):
    aggregation: Aggregation = "token-mean"
    k: float = 2e-3
    kl_coef: float = 1.0
    kl: Literal["abs", "k3"] = "abs"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("k", 0 < self.k <= 1, "a share of the tokens above 0 and at most 1")
        self.check("kl_coef", self.kl_coef >= 0, "a number of at least 0")

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        cov = covariance(stats.logprob, self.advantage(batch, stats, prepared), batch.mask, reduce)
        count = count_of(self.k, num_selected(batch.mask, reduce))
        return Prepared({"penalised": top_k(cov, batch.mask, count, token_keys(batch), reduce)})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"penalised": self.chosen(batch, stats, reduce, "penalised")}

    @property
    def ppo_surrogate(self) -> surrogates.PPO:
        return surrogates.Unclipped(clip_low=self.clip_low, clip_high=self.clip_high)

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        log_r = log_ratio(stats.logprob, batch.old_logprob)
        distance = log_r.abs() if self.kl == "abs" else k3(batch.old_logprob, stats.logprob)
        penalty = torch.where(prepared.token["penalised"], self.kl_coef * distance, 0.0)
        return super().policy_loss(batch, stats, prepared) + penalty

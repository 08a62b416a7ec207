"""Clip-Cov: stop the gradient of a few tokens of high covariance (arXiv 2505.22617, section 4).

Entropy falls most by few tokens: those that are both likely and of high advantage (a high covariance) are pushed up
again and again. Clip-Cov takes some of these tokens out of the update, and leaves all others as they are.

    Cov_t = (logp_t - mean logp)(A_t - mean A)             means over all N valid tokens
    E     = tokens with w_low < Cov_t < w_high that the clip range does not already clip
    C     = max(int(r N), 1) tokens sampled from E at random
    L     = (1/N) sum_{t not in C} max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high))

logp is the current policy's. The denominator stays N. Clip range 1 / 1, and no dual clip, as in the paper's runs.

Scope. Means, N and the random choice are over the whole mini-batch on all ranks. The choice goes by a hash of
``seed``, the number of updates so far (in the checkpoint) and the token's own place in its group, so that it is the
same on every rank and under every layout. ``scope = "micro_batch"``, as in the authors' code: each micro-batch its own
means and its own choice of at least one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation, Prepared, Reducer, num_selected
from megatron_ext.methods.selection import Selective, count_of, covariance, token_keys, top_k
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class ClipCov(Selective):
    aggregation: Aggregation = "token-mean"
    clip_low: float = 1.0
    clip_high: float = 1.0
    r: float = 2e-4
    w_low: float = 1.0
    w_high: float = 5.0
    seed: int = 0
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="clip_cov/stopped", section="Entropy", title="Selected tokens", unit="share of tokens",
            meaning="tokens whose gradient is stopped",
            good="near r, where enough tokens lie between w_low and w_high"),
    )  # fmt: skip
    updates: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("r", 0 < self.r <= 1, "a share of the tokens above 0 and at most 1")
        self.check("w_high", self.w_low < self.w_high, f"more than w_low = {self.w_low}")
        self.check("seed", 0 <= self.seed < 2**31, "a number from 0 to 2147483647")

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        self.updates += 1
        return super().prepare(batch, current, reduce)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        advantage = self.advantage(batch, stats, prepared)
        moves = self.policy_surrogate.weight(batch, stats.logprob, advantage) != 0
        cov = covariance(stats.logprob, advantage, batch.mask, reduce)
        eligible = batch.mask & moves & (cov > self.w_low) & (cov < self.w_high)
        count = count_of(self.r, num_selected(batch.mask, reduce))
        key = token_keys(batch, (self.seed << 32) + self.updates)
        chosen = top_k(torch.zeros_like(cov), eligible, count, key, reduce)
        return Prepared({"stopped": chosen})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"stopped": self.chosen(batch, stats, reduce, "stopped")}

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        return torch.where(prepared.token["stopped"], 0.0, super().policy_loss(batch, stats, prepared))

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        stopped = self.complete(batch, stats, prepared).token["stopped"]
        return super().metrics(batch, stats, prepared) | {"clip_cov/stopped": stopped.sum()}

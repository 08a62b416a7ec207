"""STEER: tokens weigh less, the more their update would change entropy (arXiv 2510.10150, theorem 1 and eq. 9).

What an update does to entropy depends on a token's advantage, on its probability, on the entropy beside it and on the
clip range, all at once, and methods that look at one or two of these miss the rest. STEER estimates the change from all
four and weighs each token down by its size, whichever its direction.

    Omega_t = A_t r_t pi_t (1 - pi_t) (log pi_t + H_t),  0 where the clip range (or dual_clip) stops the token
    w_t     = exp(log(lambda_min) |Omega_t| / max |Omega|)                     in [lambda_min, 1]
    L       = (1/N) sum_t w_t max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high))

-Omega is to first order what a step along the sampled token's logit alone adds to the entropy. pi and H,
full-vocabulary, are the current policy's; w is a constant. Another surrogate has its own weight in the place of r_t.
lambda_min .7, clip range .2 / .28, no KL.

Scope. The maximum is over the whole mini-batch on all ranks. ``scope = "micro_batch"``, as in the authors' code: each
micro-batch its own.

Differs from the authors' code: ``variant = "authors"`` has A_t / pi_old_t in the place of A_t r_t, which makes unlikely
tokens the largest, H of the policy that sampled, no eye for the clip range, and at least ``floor`` for the maximum, so
that small changes are left alone. Their run has ``lambda_min = 0.8``, ``dual_clip = 10.0`` and the scope above; a
second one, which maps |Omega| linearly to weights from 1.2 down to .8, is not offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared, Reducer
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.selection import Selective
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class STEER(ClipHigher, Selective):
    lambda_min: float = 0.7  # the least weight
    floor: float = 0.02  # the least maximum, of the authors' variant alone
    variant: Literal["paper", "authors"] = "paper"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="steer/weight", section="Entropy", title="Token weight", unit="weight",
            meaning="mean of w, with which a token's loss is multiplied",
            good="near 1: few tokens change entropy most",
            low="most tokens change entropy alike, and all of them learn less"),
        Metric(name="steer/largest", section="Entropy", title="Estimated entropy change", unit="nats",
            meaning="max |Omega| of the mini-batch: the estimated change of entropy at a token by an update of unit "
            "size, the largest"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lambda_min", 0 < self.lambda_min <= 1, "a weight above 0 and at most 1")
        self.check("floor", self.floor > 0, "a number above 0")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True, old=self.variant == "authors")

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        size = self.entropy_change(batch, stats, prepared).abs()
        size = torch.where(batch.mask & size.isfinite(), size, 0.0)
        own = torch.cat([size, size.new_zeros(1)]).amax()
        largest = reduce.concat(own[None]).amax()
        at_least = self.floor if self.variant == "authors" else torch.finfo(size.dtype).tiny
        weight = (math.log(self.lambda_min) * size / largest.clamp(min=at_least)).exp()
        return Prepared({"steer": weight}, {"steer/largest": float(largest)})

    def entropy_change(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        """Omega, ``[T]``."""
        advantage = self.advantage(batch, stats, prepared)
        if self.variant == "authors":
            assert batch.old is not None and batch.old.entropy is not None
            p = stats.logprob.exp().clamp(1e-8, 1 - 1e-8)
            coefficient = advantage / batch.old_logprob.exp().clamp(1e-8, 1.0)
            return coefficient * p * (1 - p) * (p.log() + batch.old.entropy)
        assert stats.entropy is not None
        weight, p = self.policy_surrogate.weight(batch, stats.logprob, advantage), stats.logprob.exp()
        return advantage * weight * p * (1 - p) * (stats.logprob + stats.entropy)

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        return prepared.token["steer"] * super().policy_loss(batch, stats, prepared)

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        weight = self.complete(batch, stats, prepared).token["steer"]
        return super().metrics(batch, stats, prepared) | {"steer/weight": torch.where(batch.mask, weight, 0.0).sum()}

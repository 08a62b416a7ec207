"""CE-GPPO: tokens beyond the clip range keep a bounded gradient (arXiv 2509.20712, section 3.2).

The tokens that a clip range takes out of the update are mostly unlikely ones, and entropy needs them: those of positive
advantage raise it, those of negative advantage lower it. CE-GPPO gives both their gradient back, at the size that it
has on the bound, with a weight for each side.

    F_t = beta_1 (1 - clip_low)     where r_t < 1 - clip_low and A_t < 0
          beta_2 (1 + clip_high)    where r_t > 1 + clip_high and A_t > 0
          r_t                       elsewhere
    L   = (1/N) sum_t -A_t F_t r_t / sg(r_t)        so  dL = (1/N) sum_t -A_t F_t dlogp_t

sg lets no gradient through. A larger beta_1 lowers entropy faster, a larger beta_2 holds it up; where both are 0 the
gradient is that of the clip. beta_1 is .5 or .75 and beta_2 1 in the paper, which recommends .5 across models (.75 was
better at 7B), a range of .2 on both sides and no KL. GPPO (arXiv 2508.07629) has 1 and 1.

There is no statistic: a token's factor is its own. N counts the tokens of the mini-batch over all ranks.

Differs from the authors' code, which bounds the loss of negative advantages too: ``dual_clip = 10.0``. Its runs add .1
times the negative log-likelihood of right responses, which the paper's objective has not: not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.methods import surrogates
from megatron_ext.methods.base import Aggregation
from megatron_ext.methods.grpo import GRPO
from megatron_ext.types import Batch


@dataclass(frozen=True, kw_only=True)
class Preserving(surrogates.PPO):
    """A token beyond the clip range keeps its gradient, at the size that it has on the bound, times a factor."""

    beta_1: float
    beta_2: float

    def unbounded(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        ratio = self.ratio(batch, logprob)
        return -advantage * (self.factor(batch, logprob, advantage) / ratio.detach()) * ratio

    def factor(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        low, high = self.clipped(batch, logprob, advantage)
        factor = torch.where(low, self.beta_1 * (1 - self.clip_low), self.ratio(batch, logprob.detach()))
        return torch.where(high, self.beta_2 * (1 + self.clip_high), factor)


@dataclass(kw_only=True)
class CEGPPO(GRPO):
    aggregation: Aggregation = "token-mean"
    beta_1: float = 0.5  # of negative advantages, below the range
    beta_2: float = 1.0  # of positive advantages, above it

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_1", "beta_2"):
            self.check(name, getattr(self, name) >= 0, "a factor of at least 0")

    @property
    def is_surrogate(self) -> bool:
        return True

    @property
    def ppo_surrogate(self) -> surrogates.PPO:
        return Preserving(**vars(super().ppo_surrogate), beta_1=self.beta_1, beta_2=self.beta_2)

"""SENT, the token part: KL on low-entropy tokens, stronger where covariance is high (arXiv 2512.04359, section IV-B).

Problems that are too uncertain for the policy, met too early, and updates that make certain tokens more certain still
let entropy collapse. SENT orders problems from certain to uncertain, and holds low-entropy tokens near a reference.

    T_low  = the low_ratio N tokens of lowest entropy, N = all tokens         "80 %" and "0.0002" are ratios, although
    Cov_t  = (logp_t - mean logp)(A_t - mean A), means over T_low             the paper writes them as thresholds
    T_high = the max(int(cov_ratio |T_low|), 1) tokens of highest Cov in T_low
    b_t    = beta_high on T_high, beta_low on the rest of T_low, 0 elsewhere
    L      = L_GRPO + mean_i mean_t b_t KL_t(pi || ref)                       KL_t: GRPO's k3 estimate

Entropy and logp are the current policy's, full vocabulary, constants of the selection. The curriculum by semantic
entropy, SENT's other part, is the order of the data: ``data.curriculum``, made by tools/semantic_entropy.py. Figure 5
has its second stage from step 200 on (``data.stage_starts``), which for 5 epochs is later than half of the steps. In
the authors' scripts that stage is a run of its own from the first one's model: ``data.stage_restart`` gives it a new
optimizer, and the model that it starts from as its reference.

Scope. T_low, T_high and the means are over the whole mini-batch on all ranks, ties by the token's key
(selection.py); ``scope = "micro_batch"``: over each micro-batch, as in the authors' code.

Differs from the authors' code, whose intent ``variant = "authors"`` reproduces: the policy loss is not clipped,
|logp - logp_old| stands in the place of the KL, and besides T_high only the k tokens of LOWEST Cov in T_low have
beta_low, k = max(int(cov_ratio |T_low|), 1) for both, also where the two sets meet. Their run has ``beta_low = .05``,
``beta_high = .2`` and a KL to the reference of ``beta = .001`` on every token. (Their indexing gathers tokens by an
integer mask, so their covariances belong to other tokens: not reproduced.)

Ablations: ``beta_high = beta_low`` removes the covariance tier, both 0 the token part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.methods import surrogates
from megatron_ext.methods.base import Needs, Prepared, Reducer, log_ratio, num_selected
from megatron_ext.methods.grpo import k3
from megatron_ext.methods.selection import Selective, count_of, covariance, token_keys, top_k
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class SENT(Selective):
    low_ratio: float = 0.8
    cov_ratio: float = 2e-4
    beta_low: float = 0.5
    beta_high: float = 2.0
    variant: Literal["paper", "authors"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low_ratio", "cov_ratio"):
            self.check(name, 0 < getattr(self, name) <= 1, "a share of the tokens above 0 and at most 1")
        for name in ("beta_low", "beta_high"):
            self.check(name, getattr(self, name) >= 0, "a number of at least 0")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True, reference=self.variant == "paper" or self.beta > 0)

    @property
    def ppo_surrogate(self) -> surrogates.PPO:
        if self.variant == "paper":
            return super().ppo_surrogate
        return surrogates.Unclipped(clip_low=self.clip_low, clip_high=self.clip_high)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        _, gentle, high = self.tiers(batch, stats, prepared, reduce)
        return Prepared({"coefficient": torch.where(high, self.beta_high, self.beta_low * gentle)})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        low, _, high = self.tiers(batch, stats, Prepared(), reduce)
        return {"low entropy": low, "high covariance": high}

    def tiers(
        self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T_low, the tokens that beta_low is for, and T_high: ``[T]`` bool each."""
        assert stats.entropy is not None
        key, num_tokens = token_keys(batch), num_selected(batch.mask, reduce)
        num_low = count_of(self.low_ratio, num_tokens)
        low = top_k(-stats.entropy, batch.mask, num_low, key, reduce)
        cov = covariance(stats.logprob, self.advantage(batch, stats, prepared), low, reduce)
        num_high = count_of(self.cov_ratio, num_low)
        high = top_k(cov, low, num_high, key, reduce)
        if self.variant == "paper":
            return low, low, high
        gentle = top_k(-cov, low, num_high, key, reduce)
        return low, gentle, high & ~gentle

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        if self.variant == "paper":
            assert batch.ref_logprob is not None
            distance = k3(stats.logprob, batch.ref_logprob)
        else:
            distance = log_ratio(stats.logprob, batch.old_logprob).abs()
        return self.weight(batch, prepared) * prepared.token["coefficient"] * distance

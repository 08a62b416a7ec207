"""Lp-Reg: low-probability regularisation, for unlikely tokens that are no noise (arXiv 2510.03222, section 4).

Exploration dies with a few unlikely tokens, such as "wait" and "however", which wrong answers push down again and again
until they are never sampled. An entropy bonus also raises all the noise of the vocabulary; Lp-Reg takes the noise out
of the policy's own distribution and holds the policy to the rest, only at unlikely tokens of wrong answers.

    q   ~ pi 1[pi > kappa max pi]                               the policy without its noise, renormalised
    R   = tokens t with A_t < 0 and q(o_t) > 0 among the rho N least likely ones (by pi(o_t)) of all N
    L   = (1/N) sum_t [ -A_t clip(r_t, 0, U) + kl_coef 1[t in R] KL(q || pi) ]                  U = 10

q is a constant, that of the current policy. So KL(q || pi) = -log M, with M the probability of all tokens above kappa
max pi and membership constant: value and gradient (p - q) alike, exact on a sharded vocabulary. ``clip_low = 1``,
``clip_high = 9`` and ``dual_clip = 10`` are clip(r, 0, 10). rho is .01 for 14B and .005 for 32B, kappa .02.

Where a step has several updates the paper's q is that of the policy that sampled, and stays. That divergence is not
offered: it needs the old distribution's numbers; here q follows the policy. With one update it is the same.

Scope. R is chosen from the whole mini-batch over all ranks, ties by the token's key (selection.py);
``scope = "micro_batch"``: from each micro-batch, as in the authors' code.

Differs from the authors' code, ``variant = "authors"``: q is that of the policy that sampled, and what is held is the
sampled token alone, by k3 = q/pi - log(q/pi) - 1 at o_t where pi(o_t) < q(o_t); the least likely tokens are a share rho
of those with a negative advantage, none where that is fewer than two. Their run has the scope above and
``dual_clip = 0``, which is none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation, Needs, Prepared, Reducer, num_selected
from megatron_ext.methods.grpo import k3
from megatron_ext.methods.selection import Selective, count_of, token_keys, top_k
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class LpReg(Selective):
    aggregation: Aggregation = "token-mean"
    clip_low: float = 1.0
    clip_high: float = 9.0
    dual_clip: float | None = 10.0
    kappa: float = 0.02
    rho: float = 0.01
    kl_coef: float = 1.0
    variant: Literal["paper", "authors"] = "paper"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="lp_reg/held", section="Entropy", title="Selected tokens", unit="share of tokens",
            meaning="R: unlikely tokens of wrong answers that are no noise, at which the policy is held",
            good="below rho",
            low="0: all of the least likely tokens are noise; lower kappa or raise rho"),
        Metric(name="loss/lp_reg", section="Update", title="Loss", unit="loss",
            meaning="the added term: kl_coef KL(q || pi) at the tokens of R"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("kappa", 0 < self.kappa < 1, "a share of the likeliest token's probability above 0 and below 1")
        self.check("rho", 0 < self.rho <= 1, "a share of the tokens above 0 and at most 1")
        self.check("kl_coef", self.kl_coef >= 0, "a number of at least 0")

    @property
    def needs(self) -> Needs:
        paper = self.variant == "paper"
        return replace(super().needs, min_p=self.kappa, min_p_grad=paper, old=not paper)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        negative = batch.mask & (self.advantage(batch, stats, prepared) < 0)
        q = self.log_q(batch, stats)
        if self.variant == "paper":
            low = top_k(-stats.logprob, batch.mask, self.count(batch.mask, reduce), token_keys(batch), reduce)
            return Prepared({"held": low & negative & (q > -torch.inf)})
        count = self.count(negative, reduce)
        low = top_k(-stats.logprob, negative, count if count > 1 else 0, token_keys(batch), reduce)
        return Prepared({"held": low & (stats.logprob + 1e-6 < q)})  # equal, but for rounding, where there is no noise

    def count(self, among: Tensor, reduce: Reducer) -> int:
        return count_of(self.rho, num_selected(among, reduce))

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"held": self.chosen(batch, stats, reduce, "held")}

    def log_q(self, batch: Batch, stats: TokenStats) -> Tensor:
        """Of the sampled tokens without gradient, ``[T]``; minus infinity for noise."""
        of = stats if self.variant == "paper" else batch.old
        assert of is not None and of.min_p_logprob is not None
        return of.min_p_logprob.detach()

    def divergence(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        """Of pi from q where it is held, else 0, ``[T]``."""
        held = prepared.token["held"]
        if self.variant == "paper":
            assert stats.min_p_mass is not None
            return torch.where(held, -torch.where(held, stats.min_p_mass, 1.0).log(), 0.0)
        q = torch.where(held, self.log_q(batch, stats), 0.0)
        return torch.where(held, k3(stats.logprob, q), 0.0)

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        return self.kl_coef * self.weight(batch, prepared) * self.divergence(batch, stats, prepared)

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        prepared = self.complete(batch, stats, prepared)
        return super().metrics(batch, stats, prepared) | {
            "lp_reg/held": prepared.token["held"].sum(),
            "loss/lp_reg": self.regulariser(batch, stats, prepared).sum(),
        }

"""SIREN: selective entropy regularisation (arXiv 2509.25133, section 3).

With H^p_t the entropy of the policy renormalised inside its nucleus of mass ``p`` (the top-p mask):

    Q_i    = tau-quantile (linear interpolation) of H^p over the tokens of response i
    M_t    = [H^p_t > Q_i]                                     the peak-entropy mask
    Hbar   = mean_i ( sum_t M_t H^p_t / sum_t M_t )            0 for a response with nothing selected
    L      = L_DrGRPO + coef (Hbar - H_anchor)^2               H_anchor = Hbar of the initial policy

The square pulls from both sides: above the anchor it lowers entropy. Masks and membership in the nucleus
are constants; the gradient flows through the renormalised probabilities only.

Scope. ``mini_batch`` (default): Hbar belongs to the whole mini-batch over all data-parallel ranks. It is
measured without gradient before the mini-batch is split, and the square enters as its exact gradient,
2 coef (Hbar - H_anchor) dHbar. ``micro_batch``: each micro-batch has its own Hbar and its own square, as in
the authors' code, which therefore also penalises the variance between micro-batches.

H_anchor is measured once, over the first step's whole batch, and is part of the checkpoint.

Differs from the authors' code: ``nucleus = "below"`` reproduces its nucleus (the ranks strictly before the
crossing; it may be empty, and then most quantiles are 0 and tau is inert). The released script leaves the
clip range at .2 / .2 where the paper says .28, and its first release selects with >=, which takes every
token, padding included, when the quantile is 0; that is not offered.

Ablations: ``top_p_mask = false`` (full-vocabulary entropy), ``peak_mask = false`` (every token),
``anchor = false`` (a plain bonus, -coef Hbar; the paper then uses coef 1e-4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import Needs, Plan, Reducer, quantile_by_sequence
from megatron_ext.methods.dr_grpo import DrGRPO
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class SIREN(DrGRPO):
    p: float = 0.8
    tau: float = 0.8
    coef: float = 0.005
    nucleus: Literal["reach", "below"] = "reach"
    scope: Literal["mini_batch", "micro_batch"] = "mini_batch"
    top_p_mask: bool = True
    peak_mask: bool = True
    anchor: bool = True
    h_anchor: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p: found {self.p}, expected a mass above 0 and at most 1")
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau: found {self.tau}, expected a quantile from 0 to below 1")
        if self.coef < 0:
            raise ValueError(f"coef: found {self.coef}, expected a number of at least 0")

    @property
    def needs(self) -> Needs:
        current = self.scope == "mini_batch"
        if not self.top_p_mask:
            return Needs(entropy=True, entropy_grad=True, current=current, reference=self.beta > 0)
        return Needs(
            nucleus_p=self.p, nucleus=self.nucleus, nucleus_grad=True, current=current, reference=self.beta > 0
        )

    def observe(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, float]:
        hbar, _, share = self.selected_entropy(batch, self.entropy(stats), reduce)
        if self.h_anchor is None:
            self.h_anchor = hbar
        return {"siren/hbar": hbar, "siren/anchor": self.h_anchor, "siren/selected_share": share}

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Plan:
        if self.scope == "micro_batch":
            return Plan()
        assert current is not None
        hbar, weight, _ = self.selected_entropy(batch, self.entropy(current), reduce)
        slope, value = self.regulariser(hbar)
        return Plan({"regulariser": slope * weight}, {"loss/siren": value})

    def loss(self, batch: Batch, stats: TokenStats, plan: Plan) -> Tensor:
        loss, entropy = super().loss(batch, stats, plan), self.entropy(stats)
        if self.scope == "mini_batch":
            return loss + plan.token["regulariser"] * entropy
        own = torch.ones_like(batch.reward).sum()  # sequences of this micro-batch
        weight = self.selection_weight(batch, entropy.detach(), float(own))
        hbar = (weight * entropy).sum()
        square = self.coef * ((hbar - self.h_anchor) ** 2 if self.anchor else -hbar)
        return loss + (own / batch.num_sequences) * square / len(loss)

    def regulariser(self, hbar: float) -> tuple[float, float]:
        """Derivative with respect to Hbar, and value, of the added term."""
        if not self.anchor:
            return -self.coef, -self.coef * hbar
        assert self.h_anchor is not None
        return 2 * self.coef * (hbar - self.h_anchor), self.coef * (hbar - self.h_anchor) ** 2

    def entropy(self, stats: TokenStats) -> Tensor:
        entropy = stats.nucleus_entropy if self.top_p_mask else stats.entropy
        assert entropy is not None
        return entropy

    def selected_entropy(self, batch: Batch, entropy: Tensor, reduce: Reducer) -> tuple[float, Tensor, float]:
        """Hbar over all ranks, each token's weight in it ``[T]``, and the share of tokens selected."""
        weight = self.selection_weight(batch, entropy, batch.num_sequences)
        sums = torch.stack([(weight * entropy).double().sum(), (weight > 0).double().sum()])
        hbar, selected = reduce.sum(sums).tolist()
        return hbar, weight, selected / max(batch.num_tokens, 1)

    def selection_weight(self, batch: Batch, entropy: Tensor, num_sequences: float) -> Tensor:
        """``M_t / (sum_t M_t) / num_sequences``: Hbar is the weighted sum of the entropies."""
        selected = batch.mask
        if self.peak_mask:
            quantile = quantile_by_sequence(entropy, batch.sequence, batch.mask, self.tau, len(batch.reward))
            selected = selected & (entropy > batch.token(quantile))
        count = torch.zeros(len(batch.reward), device=entropy.device).index_add(0, batch.sequence, selected.float())
        return selected / (batch.token(count).clamp(min=1) * num_sequences)

    def state_dict(self) -> dict[str, Any]:
        return {"h_anchor": self.h_anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.h_anchor = state["h_anchor"]

"""SIREN: selective entropy regularisation (arXiv 2509.25133, section 3).

Over a large vocabulary and long responses a plain bonus spreads probability onto meaningless tokens, and entropy
explodes. SIREN counts entropy only among likely tokens and at its peaks, and holds it at the initial policy's value.

With H^p_t the entropy of the policy renormalised inside its nucleus of mass ``p`` (the top-p mask):

    Q_i    = tau-quantile (linear interpolation) of H^p over the tokens of response i
    M_t    = [H^p_t > Q_i]                                     the peak-entropy mask
    Hbar   = mean_i ( sum_t M_t H^p_t / sum_t M_t )            0 for a response with nothing selected
    L      = L_DrGRPO + coef (Hbar - H_anchor)^2               H_anchor = Hbar of the initial policy

The square pulls from both sides: above the anchor it lowers entropy. Masks and membership in the nucleus
are constants; the gradient flows through the renormalised probabilities only.

Scope. ``mini_batch`` (default): Hbar belongs to the whole mini-batch over all data-parallel ranks. It is measured
without gradient before the mini-batch is split. ``micro_batch``: each micro-batch has its own Hbar and its own square,
as in the authors' code, which therefore also penalises the variance between micro-batches. Either way the square
enters the loss as its exact gradient, 2 coef (Hbar - H_anchor) dHbar.

H_anchor is measured once, over the first step's whole batch, and is part of the checkpoint. ``target`` holds Hbar at
another value or along a schedule (targets.py), relative to H_anchor or in nats.

Differs from the authors' code: ``nucleus = "exclusive"`` reproduces its nucleus (the ranks strictly before the
cutoff token; it may be empty, and then most quantiles are 0 and tau is inert). The released script leaves the
clip range at .2 / .2 where the paper says .28, and its first release selects with >=, which takes every
token, padding included, when the quantile is 0; that is not offered.

Ablations: ``top_p_mask = false`` (full-vocabulary entropy), ``peak_mask = false`` (every token),
``anchor = false`` (a plain bonus, -coef Hbar; the paper then uses coef 1e-4).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from megatron_ext.methods.base import (
    Controller,
    Needs,
    Prepared,
    Reducer,
    num_selected,
    num_valid,
    quantile_by_sequence,
    sequence_lengths,
)
from megatron_ext.methods.dr_grpo import DrGRPO
from megatron_ext.methods.selection import Selective
from megatron_ext.methods.targets import Targeted
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class SIREN(DrGRPO, Selective, Targeted):
    p: float = 0.8
    tau: float = 0.8
    coef: float = 0.005
    nucleus: Literal["inclusive", "exclusive"] = "inclusive"
    top_p_mask: bool = True
    peak_mask: bool = True
    anchor: bool = True
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="siren/hbar", section="Entropy", title="Peak entropy", unit="nats per token",
            meaning="Hbar: mean entropy of the selected tokens, over the step's batch before its first update",
            good="near siren/anchor",
            low="raise coef, or lower optimizer.lr",
            high="raise coef"),
        Metric(name="siren/anchor", section="Entropy", title="Peak entropy", unit="nats per token",
            meaning="H_anchor: Hbar of the initial policy, or what the option target says"),
        Metric(name="siren/selected_share", section="Entropy", title="Selected tokens", unit="share of tokens",
            short="selected",
            meaning="tokens that the peak-entropy mask selects",
            good="near 1 - tau",
            low="most quantiles are 0 and few tokens are above one: see entropy/nucleus"),
        Metric(name="loss/siren", section="Update", title="Loss", unit="loss",
            meaning="the added term, coef (Hbar - H_anchor)^2"),
    )  # fmt: skip
    target_metric: ClassVar[str] = "siren/anchor"
    h_anchor: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("p", 0 < self.p <= 1, "a mass above 0 and at most 1")
        self.check("tau", 0 <= self.tau < 1, "a quantile from 0 to below 1")
        self.check("coef", self.coef >= 0, "a number of at least 0")
        self.check("target", self.target is None or self.anchor, "none: without anchor Hbar is held at nothing")

    @property
    def needs(self) -> Needs:
        if not self.top_p_mask:
            return replace(super().needs, old=True, entropy=True, entropy_grad=True)
        return replace(super().needs, old=True, nucleus_p=self.p, nucleus=self.nucleus, nucleus_grad=True)

    @property
    def controller(self) -> Controller | None:
        return Controller(measured="siren/hbar", target=self.target_metric) if self.anchor else None

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        assert stats is not None
        hbar, weight = self.selected_entropy(batch, self.entropy(stats), batch.num_sequences, reduce)
        if self.h_anchor is None:
            self.h_anchor = self.h_0 = hbar
        report = super().on_step_start(batch, stats, reduce)
        share = num_selected(weight > 0, reduce) / max(batch.num_tokens, 1)
        return report | {"siren/hbar": hbar, "siren/anchor": self.level, "siren/selected_share": share}

    @property
    def level(self) -> float:
        """What Hbar is held at."""
        assert self.h_anchor is not None
        return self.h_anchor if self.target is None else self.current_target

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        num_sequences = batch.num_sequences if self.scope == "mini_batch" else num_valid(batch)
        hbar, weight = self.selected_entropy(batch, self.entropy(stats), num_sequences, reduce)
        slope, value = self.square(hbar)
        return Prepared({"regulariser": slope * self.share(batch) * weight}, {"loss/siren": value})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"peak entropy": self.selected_entropy(batch, self.entropy(stats), 1, reduce)[1] > 0}

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        return prepared.token["regulariser"] * self.entropy(stats)

    def square(self, hbar: float) -> tuple[float, float]:
        """Derivative with respect to Hbar, and value, of the added term."""
        if not self.anchor:
            return -self.coef, -self.coef * hbar
        return 2 * self.coef * (hbar - self.level), self.coef * (hbar - self.level) ** 2

    def entropy(self, stats: TokenStats) -> Tensor:
        entropy = stats.nucleus_entropy if self.top_p_mask else stats.entropy
        assert entropy is not None
        return entropy

    def selected_entropy(
        self, batch: Batch, entropy: Tensor, num_sequences: int, reduce: Reducer
    ) -> tuple[float, Tensor]:
        """Hbar, and each token's weight in it ``[T]``, M_t / (sum_t M_t) / ``num_sequences``."""
        selected = batch.mask
        if self.peak_mask:
            quantile = quantile_by_sequence(entropy, batch.sequence, batch.mask, self.tau, len(batch.reward))
            selected = selected & (entropy > batch.token(quantile))
        count = sequence_lengths(batch.sequence, selected, len(batch.reward)).clamp(min=1)
        weight = selected / (batch.token(count) * max(num_sequences, 1))
        return float(reduce.sum((weight * entropy).double().sum())), weight

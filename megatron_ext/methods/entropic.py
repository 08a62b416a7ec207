"""EntroPIC: entropy stabilisation with proportional-integral control (arXiv 2511.15248, section 4).

In long runs entropy drifts: learning from right samples lowers it, from wrong ones raises it, and a fixed loss
balances the two by chance. EntroPIC weighs one against the other by a controller that holds entropy at a target.

    alpha = clip( k_p (H - target) + k_i sum_k (H_k - target), -1, 1 )          the sum includes the present H
    full:              L = (1/N) sum_t (1 + alpha sgn A_t) l_t                  l = the clipped loss of GRPO
    high_probability:  L = (1/N) sum_t [ l_t - alpha r_t |A_t| [pi(o_t) > threshold] ]

Entropy below the target makes alpha negative: negative samples weigh more, entropy rises. The paper uses the second
form, the first one on likely tokens with r unclipped. (Its appendix D.7 describes the sign the other way round.)

Scope. H is the token-mean entropy of the current policy over the mini-batch on all ranks: one alpha and one step of
the integral per mini-batch. Anti-windup: while the output is clipped the integral does not follow an error that
would push it further. Integral and alpha are in the checkpoint. N counts all tokens.

Differs from the authors' code: ``normaliser = "high"`` divides the second form's control term by the number of
high-probability tokens; ``scope = "micro_batch"`` takes H and alpha from each micro-batch of m of the rank's M
responses, without the present error in the integral S and without anti-windup:

    alpha = clip( k_p (H - target) + k_i S, -1, 1 ),  then  S <- S + (H - target) m / M

Their loss has verl's dual clip, ``dual_clip = 3``. There each rank keeps its S for ever; here all go on, after each
mini-batch, with that of the first data-parallel rank's last pipeline stage, which the checkpoint holds. And
``importance.mode`` weighs both forms alike, which are two ways to write one loss; the authors leave the control term of
the second unweighed.

``k_i = 0`` is P control; ``k_p = k_i = 0`` switches the control off and leaves GRPO. The paper's targets: .1 at
temperature .6, .3 at 1, .4 for reasoning models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import (
    Aggregation,
    Controller,
    Needs,
    OneRank,
    Prepared,
    Reducer,
    Scope,
    num_selected,
    num_valid,
    shares,
    token_mean,
)
from megatron_ext.methods.targets import Target, Targeted
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class EntroPIC(Targeted):
    aggregation: Aggregation = "token-mean"
    target: Target = 0.1  # nats, or a schedule
    k_p: float = 1.0
    k_i: float = 0.01
    form: Literal["high_probability", "full"] = "high_probability"
    threshold: float = 0.95
    normaliser: Literal["all", "high"] = "all"
    scope: Scope = "mini_batch"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="entropic/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H: the entropy that is compared with the target, mean over updates", good="near target"),
        Metric(name="entropic/alpha", section="Entropy", title="Coefficient", unit="coefficient",
            meaning="alpha: the controller's output, from -1 to 1; below 0 it raises entropy",
            low="at -1 the control can push no further: change threshold or target",
            high="at 1 the control can push no further: change threshold or target"),
        Metric(name="entropic/integral", section="Entropy", title="Integral", unit="nats",
            meaning="sum of the errors H - target so far, as the controller weighs them"),
    )  # fmt: skip
    integral: float = field(default=0.0, init=False)
    alpha: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("threshold", 0 <= self.threshold < 1, "a probability from 0 to below 1")
        for name in ("k_p", "k_i"):
            self.check(name, getattr(self, name) >= 0, "a gain of at least 0")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True, current=self.scope == "mini_batch")

    @property
    def controller(self) -> Controller | None:
        if self.k_p == self.k_i == 0:
            return None
        return Controller(measured="entropy/full", target=self.controller_target, output="entropic/alpha", bound=1.0)

    @property
    def loss_moves_state(self) -> bool:
        return self.scope == "micro_batch"

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        if self.scope == "micro_batch":
            return Prepared({"share": shares(batch)})
        assert current is not None
        return self.control(batch, current, reduce)

    def loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        if self.scope == "micro_batch":
            prepared = self.control(batch, stats.detach(), OneRank(), share=float(prepared.token["share"].sum()))
        return super().loss(batch, stats, prepared)

    def control(self, batch: Batch, stats: TokenStats, reduce: Reducer, share: float = 1.0) -> Prepared:
        """Measure, move the controller by one step, and fix the control term's weight per token."""
        assert stats.entropy is not None
        entropy = token_mean(stats.entropy, batch.mask, reduce)
        self.advance(entropy, share)
        high = batch.mask & (stats.logprob.exp() > self.threshold)
        weight = batch.weight * (high if self.form == "high_probability" else 1)
        if self.form == "high_probability" and self.normaliser == "high":
            part = 1.0 if self.scope == "mini_batch" else num_valid(batch) / max(batch.num_sequences, 1)
            weight = high * (part / max(num_selected(high, reduce), 1))
        return Prepared(
            {"control": self.alpha * weight},
            {"entropic/entropy": entropy, "entropic/alpha": self.alpha, "entropic/integral": self.integral},
        )

    def advance(self, entropy: float, share: float = 1.0) -> None:
        """One step of the controller; ``share`` of this rank's mini-batch is what was measured."""
        error, lags = entropy - self.current_target, self.scope == "micro_batch"
        output = self.k_p * error + self.k_i * (self.integral if lags else self.integral + error)
        if lags or not (abs(output) > 1 and output * error > 0):
            self.integral += error * share
        self.alpha = min(max(output, -1.0), 1.0)

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        advantage = self.advantage(batch, stats, prepared)
        if self.form == "full":
            return prepared.token["control"] * torch.sign(advantage) * self.policy_loss(batch, stats, prepared)
        loss = batch.corrected(self.policy_surrogate.unclipped(batch, stats.logprob, advantage))
        return prepared.token["control"] * torch.sign(advantage) * loss

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        own = super().metrics(batch, stats, prepared)
        if self.scope == "mini_batch":
            return own
        count = batch.mask.sum()  # means over tokens of what each micro-batch's loss has just been given
        return own | {"entropic/alpha": self.alpha * count, "entropic/integral": self.integral * count}

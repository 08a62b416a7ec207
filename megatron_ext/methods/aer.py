"""AER: adaptive entropy regularisation (arXiv 2510.10959, section 4).

A fixed entropy coefficient is too weak for one task and too strong for another, and it makes the policy explore where
a problem is solved already. AER gives the bonus to difficult problems, and adapts its strength to hold a target.

    L         = L_GRPO - mean_i [ lambda(q_i) (1/|o_i|) sum_t H_t ]
    lambda(q) = alpha max(0, rho - g) / (rho + 1e-8) + alpha [rho == 0 and g == 0]     C1, g = accuracy of q's group
    H*        = tau H_0                                                                C2
    alpha    <- max(0, alpha + eta sgn(H* - H)),  sgn(0) = 0, after each step          C3

H_t is the full-vocabulary entropy of the current policy, with gradient. Responses with lambda 0 count in the
mean. H is the token-mean entropy of the step's whole batch under the policy that sampled it, over all ranks, H_0 that
of the first step. alpha moves once per step; alpha and H_0 are in the checkpoint. The paper does not state the first
alpha: ``alpha_0 = 0``.

With 8 responses and rho .2 only g = 0 and g = 1/8 have a bonus, and a group with g = 0 has no advantage: its only
gradient is the bonus. At a fixed coefficient of .1 accuracy collapses in the paper's own trials (section 3). It states
neither the responses per prompt nor the temperature of its training: the recipes take 8 and 1.

No code of the authors was found.

Ablations: ``allocate = false`` leaves C1 out (lambda = alpha everywhere), ``adapt = false`` leaves C2 and C3 out
(alpha = alpha_0), the two together are a fixed coefficient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.methods.base import (
    Controller,
    Needs,
    Prepared,
    Reducer,
    group_statistics,
    sequence_lengths,
)
from megatron_ext.methods.targets import Schedule, Targeted
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class AER(Targeted):
    tau: float = 0.4
    rho: float = 0.2
    eta: float = 0.005
    alpha_0: float = 0.0
    allocate: bool = True
    adapt: bool = True
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="aer/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H: the entropy that is compared with the target",
            good="near aer/target",
            low="raise eta"),
        Metric(name="aer/target", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H*: tau H_0, or what the option target says"),
        Metric(name="aer/alpha", section="Entropy", title="Coefficient", unit="coefficient",
            meaning="alpha: the entropy bonus's coefficient in this step",
            high="a fixed 0.1 ends in a collapse of accuracy in the paper: lower eta or tau"),
    )  # fmt: skip
    target_metric: ClassVar[str] = "aer/target"
    alpha: float = field(default=0.0, init=False)  # in force
    next_alpha: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tau", self.tau > 0, "a ratio above 0")
        own = type(self).__dataclass_fields__["tau"].default
        self.check("tau", self.target is None or self.tau == own, f"{own}, its default, since target is given")
        self.check("rho", 0 <= self.rho <= 1, "an accuracy from 0 to 1")
        self.check("eta", self.eta > 0, "a step above 0")
        self.check("alpha_0", self.alpha_0 >= 0, "a coefficient of at least 0")
        self.alpha = self.next_alpha = self.alpha_0

    @property
    def own_target(self) -> Schedule:
        return Schedule(kind="constant", start=self.tau, relative=True)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, old=True, entropy=True, entropy_grad=True)

    @property
    def controller(self) -> Controller | None:
        return Controller(measured="aer/entropy", target="aer/target", output="aer/alpha") if self.adapt else None

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        report, entropy = super().on_step_start(batch, stats, reduce), self.measured(batch, stats, reduce)
        self.alpha = self.next_alpha
        error = self.current_target - entropy
        if self.adapt and error:
            self.next_alpha = max(0.0, self.alpha + math.copysign(self.eta, error))
        return report | {"aer/entropy": entropy, "aer/target": self.current_target, "aer/alpha": self.alpha}

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        length = sequence_lengths(batch.sequence, batch.mask, len(batch.reward)).clamp(min=1)
        per_token = self.coefficient(batch) / (length * max(batch.num_sequences, 1))
        return Prepared({"bonus": batch.mask * batch.token(per_token)})

    def coefficient(self, batch: Batch) -> Tensor:
        """lambda of each response, ``[B]``."""
        if not self.allocate:
            return torch.full_like(batch.reward, self.alpha)
        correct = torch.where(batch.reward.isnan(), batch.reward, (batch.reward > 0).to(batch.reward.dtype))
        accuracy, _, _ = group_statistics(correct, batch.group)
        if self.rho == 0:
            return self.alpha * (accuracy == 0)
        return self.alpha * (self.rho - accuracy).clamp(min=0) / (self.rho + 1e-8)

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        assert stats.entropy is not None
        return -prepared.token["bonus"] * stats.entropy

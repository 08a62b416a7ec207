"""AEC: adaptive entropy control of Skywork-OR1 (arXiv 2505.22312, section on MAGIC).

A constant entropy coefficient is hard to choose: what holds one run's entropy lets another's collapse or explode.
AEC raises the coefficient step by step while entropy is below a target, lowers it otherwise, and applies it only below.

    L       = L_GRPO - c_k I_k agg_t(H_t)                          I_k = [e_k < target]
    c_{k+1} = clip(c_k + delta if e_k < target else c_k - delta,  0, c_max)

e_k is the token-mean entropy of step k's whole batch under the policy that sampled it, over all ranks. H_t is the
full-vocabulary entropy of the current policy, with gradient; ``agg`` is the policy loss's aggregation, token-mean
as in the paper. The coefficient moves once per step. c_{k+1}, I_k and what was applied are in the checkpoint. The
target may be a schedule (targets.py).

Differs from the authors' code, which measures e_k as -mean(logp_old) of the sampled tokens, ``measure = "logprob"``
(equal in expectation, noisier), and applies what the steps before have decided, c_k I_{k-1} with I_0 = 1:
``gate = "previous"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from megatron_ext.methods.base import Aggregation, Controller, Needs, Prepared, Reducer
from megatron_ext.methods.targets import Target, Targeted
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class AEC(Targeted):
    aggregation: Aggregation = "token-mean"
    target: Target = 0.2  # nats, or a schedule
    delta: float = 1e-4
    c_max: float = 0.005
    c_0: float = 0.0
    measure: Literal["entropy", "logprob"] = "entropy"
    gate: Literal["current", "previous"] = "current"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="aec/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="e_k: the entropy that is compared with the target",
            good="near target",
            low="raise c_max or delta"),
        Metric(name="aec/applied", section="Entropy", title="Coefficient", unit="coefficient",
            meaning="c_k I_k: the entropy bonus's coefficient in this step; 0 while entropy is above the target"),
        Metric(name="aec/next", section="Entropy", title="Coefficient", unit="coefficient",
            meaning="c_{k+1}: the coefficient of the next step",
            high="at c_max the control can push no further: raise c_max"),
    )  # fmt: skip
    c: float = field(default=0.0, init=False)  # c_{k+1}
    applied: float = field(default=0.0, init=False)  # c_k I_k
    below: bool = field(default=True, init=False)  # I_k

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("delta", self.delta > 0, "a number above 0")
        self.check("c_0", 0 <= self.c_0 <= self.c_max, f"a number from 0 to c_max = {self.c_max}")
        self.c = self.c_0

    @property
    def needs(self) -> Needs:
        return replace(super().needs, old=True, entropy=True, entropy_grad=True)

    @property
    def controller(self) -> Controller:
        target, bound = self.controller_target, self.c_max
        return Controller(measured="aec/entropy", target=target, output="aec/applied", bound=bound)

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        report, entropy = super().on_step_start(batch, stats, reduce), self.measured(batch, stats, reduce)
        before, self.below = self.below, entropy < self.current_target
        self.applied = self.c if (self.below if self.gate == "current" else before) else 0.0
        self.c = min(max(self.c + (self.delta if self.below else -self.delta), 0.0), self.c_max)
        return report | {"aec/entropy": entropy, "aec/applied": self.applied, "aec/next": self.c}

    @property
    def measures_logprob(self) -> bool:
        return self.measure == "logprob"

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        assert stats.entropy is not None
        return -self.applied * self.weight(batch, prepared) * stats.entropy

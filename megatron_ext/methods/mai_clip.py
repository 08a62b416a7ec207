"""MAI adaptive clip: a clip bound that holds entropy (https://microsoft.ai/pdf/mai-thinking-1.pdf; arXiv 2402.03300).

Over thousands of steps a narrow upper bound lets entropy collapse and a wide one lets it explode, and an entropy bonus
held it less well. MAI-Thinking-1 widens the bound while entropy is below a target and narrows it while it is above.

    L    = -(1/N) sum_t min(A r, clip(r, 1 - e, 1/(1 - e) + k_u) A),  r <- min(r, 50) on every branch       eq. 5, 9
    H^   = (1/N) sum_t r_t (-log pi(o_t))                                                                     eq. 7
    k_u' = clip(k_u + delta sgn(target - H^), 0, k_max),  k_0 = 0, the k of the next update                   eq. 8

    e .6, delta .25, k_max 2.5, target .3 (section 3.1.5 of the report; the equations are in 3.1.1)

e is ``clip_low``, and 1/(1 - e) is 1 + ``clip_high``: at .6 and 1.5 the interval is symmetric in log r while k is 0.
Who changes one of them changes the other.
Only tokens of negative advantage can reach r = 50, and there the loss stops: that is ``dual_clip = 50``.

Scope. H^ is the mean over the mini-batch's N tokens on all ranks, under the policy as it is before the update; k moves
once per update and is in the checkpoint. The tokens were sampled by the old policy: r makes -log pi an estimate of the
present policy's entropy at the old one's prefixes. ``measure = "entropy"`` takes that entropy itself, over the whole
vocabulary: the same mean, without the noise of one token. The target may be a schedule (targets.py).

The report's code is not public. LLM360's fork of miles has the same bound and the same rule, ``k_0`` among its options;
the numbers of its tests are in tests/methods/test_mai_clip.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from megatron_ext.methods.base import Aggregation, Controller, Needs, Prepared, Reducer, log_ratio, token_mean
from megatron_ext.methods.control import MovingClip
from megatron_ext.methods.targets import Target, Targeted
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class MAIClip(MovingClip, Targeted):
    aggregation: Aggregation = "token-mean"
    clip_low: float = 0.6
    clip_high: float = 1.5  # 1 / (1 - clip_low) - 1
    dual_clip: float | None = 50.0
    target: Target = 0.3  # nats, or a schedule
    delta: float = 0.25
    k_max: float = 2.5
    k_0: float = 0.0
    measure: Literal["importance", "entropy"] = "importance"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="mai_clip/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H^: the entropy that is compared with the target, mean over updates", good="near target"),
        Metric(name="mai_clip/k", section="Entropy", title="Coefficient", unit="ratio",
            meaning="k: how much the upper clip bound is widened, mean over updates",
            low="at 0 the control can push no further down: lower clip_high",
            high="at k_max the control can push no further up: raise k_max, or the updates per step, since a ratio "
            "that never leaves 1 is never clipped"),
    )  # fmt: skip
    k: float = field(default=0.0, init=False)  # of the next update

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("clip_low", self.clip_low < 1, "a number from 0 to below 1")
        self.check("delta", self.delta > 0, "a number above 0")
        self.check("k_max", self.k_max >= 0, "a number of at least 0")
        self.check("k_0", 0 <= self.k_0 <= self.k_max, f"a number from 0 to k_max = {self.k_max}")
        self.k = self.k_0

    @property
    def needs(self) -> Needs:
        return replace(super().needs, current=True, entropy=self.measure == "entropy")

    @property
    def controller(self) -> Controller:
        target, bound = self.controller_target, self.k_max
        return Controller(measured="mai_clip/entropy", target=target, output="mai_clip/k", bound=bound)

    @property
    def measures_logprob(self) -> bool:
        return self.measure == "importance"  # of the policy that sampled, whose every ratio is 1

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        assert current is not None
        value = current.entropy
        if self.measure == "importance":
            value = -current.logprob * log_ratio(current.logprob, batch.old_logprob).exp()
        assert value is not None
        entropy, k = token_mean(value, batch.mask, reduce), self.k
        self.high = self.clip_high + k
        self.advance(entropy)
        return Prepared({}, {"mai_clip/entropy": entropy, "mai_clip/k": k})

    def advance(self, entropy: float) -> None:
        """One step of the controller."""
        if error := self.current_target - entropy:
            self.k = min(max(self.k + math.copysign(self.delta, error), 0.0), self.k_max)

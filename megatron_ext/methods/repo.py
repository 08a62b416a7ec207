"""REPO-R and ADAPO: an advantage, or a clip range, that keeps the initial entropy (arXiv 2603.11682).

A policy that is right where it is sure has advantages that rise with its log-probs, and each update makes it surer yet:
entropy falls. REPO takes a part of the log-prob out of the advantage; ADAPO lets unlikely tokens grow further instead.

    A' = A - b L,  L = log pi + H_t                              the family: L is log pi less its mean, -H_t
    b  = zeta |A|,  log pi for L                                 REPO-R, and what follows (appendix D.2)
    A' = max(0, A (1 - zeta log pi))  if A > 0,   min(0, A (1 + zeta log pi))  if A < 0
    zeta is doubled where H < target and halved where H > target; below zeta_min it changes its sign, and where it is
    negative the two change places; |zeta| stays in [1e-4, .05]

log pi and H_t are the current policy's at the token, constants. REPO-R rewards rare right tokens more and punishes rare
wrong ones less. The paper puts log pi for L because H_t was too dear to compute; here it is exact and cheap:
``form = "centred"`` is REPO-R with L, ``form = "full"`` the family with b = zeta, where tokens without advantage move
too and zeta needs other bounds. (The paper's REPO-D, whose b follows the entropy's own change, is left out.)

ADAPO is DAPO's loss (clip_higher.py) whose upper clip bound rises by ``delta`` where H < (1 - band) target and falls by
``delta`` where H > target. The paper's rule is that direction; delta, band and the bounds' limits are this page's own.

Scope. H is the token-mean entropy of the step's whole batch under the policy that sampled it, over all ranks; zeta and
the bound move once a step, before its first update, and are in the checkpoint. The target is H of the first step (in
the checkpoint), or the option ``target``, which may be a schedule (targets.py). ``adapt = false`` leaves zeta where it
is.

The authors' code is not public. A pull request to SkyRL (1896, open) has the same A', with log pi from -20 on, and the
same rule; there H is measured while the step trains, so zeta moves a step later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import Controller, Prepared, Reducer
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.control import KeepsEntropy, MovingClip
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class REPO(KeepsEntropy):
    form: Literal["rescaled", "centred", "full"] = "rescaled"
    zeta_0: float = 1e-3
    zeta_min: float = 1e-4
    zeta_max: float = 0.05
    adapt: bool = True
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="repo/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H: the entropy that is compared with the target", good="near repo/target", low="raise zeta_max"),
        Metric(name="repo/target", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="the entropy of the first step, or what the option target says"),
        Metric(name="repo/zeta", section="Entropy", title="Coefficient", unit="coefficient",
            meaning="zeta in this step; above 0 it raises entropy, below 0 it lowers it",
            low="at -zeta_max the control can push no further", high="at zeta_max the control can push no further"),
    )  # fmt: skip
    target_metric: ClassVar[str] = "repo/target"
    zeta: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("zeta_min", self.zeta_min > 0, "a number above 0")
        self.check("zeta_max", self.zeta_min <= self.zeta_max, f"at least zeta_min = {self.zeta_min}")
        self.check("zeta_0", abs(self.zeta_0) <= self.zeta_max, f"at most zeta_max = {self.zeta_max}, or its negative")
        self.zeta = self.zeta_0

    @property
    def controller(self) -> Controller | None:
        if not self.adapt:
            return None
        return Controller(measured="repo/entropy", target="repo/target", output="repo/zeta", bound=self.zeta_max)

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        report, entropy = super().on_step_start(batch, stats, reduce), self.measured(batch, stats, reduce)
        target = self.current_target
        if self.adapt:
            self.advance(entropy, target)
        return report | {"repo/entropy": entropy, "repo/target": target, "repo/zeta": self.zeta}

    def advance(self, entropy: float, target: float) -> None:
        """One step of the controller: a zeta that pushes the right way is doubled, one that pushes the other halved."""
        if entropy == target:
            return
        sign = 1 if entropy < target else -1
        push = sign * self.zeta
        push = min(2 * push, self.zeta_max) if push > 0 else push / 2
        self.zeta = sign * (self.zeta_min if -self.zeta_min < push <= 0 else push)

    def advantage(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        advantage, logprob = super().advantage(batch, stats, prepared), stats.logprob.detach()
        if self.form != "rescaled":
            assert stats.entropy is not None
            logprob = logprob + stats.entropy.detach()  # L
        if self.form == "full":
            return advantage - self.zeta * logprob
        return advantage * (1 - torch.sign(advantage) * self.zeta * logprob).clamp(min=0)  # A' keeps the sign of A


@dataclass(kw_only=True)
class ADAPO(ClipHigher, KeepsEntropy, MovingClip):
    delta: float = 0.01
    band: float = 0.1
    clip_high_min: float = 0.2
    clip_high_max: float = 0.4
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="adapo/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H: the entropy that is compared with the target", good="near adapo/target",
            low="raise clip_high_max", high="lower clip_high_min"),
        Metric(name="adapo/target", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="the entropy of the first step, or what the option target says"),
        Metric(name="adapo/clip_high", section="Entropy", title="Clip bound", unit="ratio",
            meaning="how far above 1 the probability ratio may rise in this step"),
    )  # fmt: skip
    target_metric: ClassVar[str] = "adapo/target"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("delta", self.delta >= 0, "a number of at least 0")
        self.check("band", 0 <= self.band < 1, "a share of the target from 0 to below 1")
        self.check("clip_high_min", self.clip_high_min >= 0, "a number of at least 0")
        limits = f"from clip_high_min = {self.clip_high_min} to clip_high_max = {self.clip_high_max}"
        self.check("clip_high", self.clip_high_min <= self.clip_high <= self.clip_high_max, limits)

    @property
    def controller(self) -> Controller:
        return Controller(
            measured="adapo/entropy", target="adapo/target", output="adapo/clip_high", bound=self.clip_high_max
        )

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        report, entropy = super().on_step_start(batch, stats, reduce), self.measured(batch, stats, reduce)
        target = self.current_target
        self.advance(entropy, target)
        return report | {"adapo/entropy": entropy, "adapo/target": target, "adapo/clip_high": self.high}

    def advance(self, entropy: float, target: float) -> None:
        """One step of the controller."""
        if entropy < (1 - self.band) * target:
            self.high = min(self.high + self.delta, self.clip_high_max)
        elif entropy > target:
            self.high = max(self.high - self.delta, self.clip_high_min)

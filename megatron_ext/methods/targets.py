"""Targets: the entropy that a method holds the policy at, fixed or moving with the steps of the run.

One number asks the same of every step and of every model. A policy that is to explore first and to commit later needs a
target that falls, and models that begin at different entropies need one that is relative to it.

``target = 0.3`` is a number of nats. A table is a schedule over the training steps, n of which came before this one:

    target = {kind = "linear", start = 0.6, end = 0.2, steps = 500}

    constant   start
    linear     start + (end - start) x                             x = min(n / steps, 1)
    cosine     end + (start - end) (1 + cos(pi x)) / 2
    step       start + (end - start) floor(stages x) / stages      stages = 1: start for ``steps`` steps, then end

``relative = true`` multiplies it with H_0: what the method compares with its target, as it was in the run's first step.

Every method that controls entropy has it: ``target`` of AEC, EntroPIC and MAI's clip is a number of nats by default,
AER's is tau H_0, REPO's and ADAPO's H_0 and SIREN's H_anchor, where ``target`` is not given. (Entrocraft has a range.)
n counts steps, not the updates in them. n and H_0 are in the checkpoint where a target needs them, and a resumed run
goes on with them to the bit. The metric ``entropy/target`` is the target of each step where it is a schedule; AER's is
``aer/target``, SIREN's ``siren/anchor``, REPO's ``repo/target`` and ADAPO's ``adapo/target``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from megatron_ext.methods.base import Needs, Reducer, token_mean
from megatron_ext.methods.grpo import GRPO
from megatron_ext.metric import Metric
from megatron_ext.plugins import check_options, options_of_class
from megatron_ext.types import Batch, TokenStats

Target = float | dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A target over the steps of a run. Raises ValueError for values that make none."""

    kind: Literal["constant", "linear", "cosine", "step"]
    start: float
    end: float | None = None
    steps: int | None = None
    stages: int = 1  # of kind step: equal changes on the way from start to end
    relative: bool = False  # to the first measured entropy; else in nats

    def __post_init__(self) -> None:
        what = "a share of H_0 above 0" if self.relative else "an entropy above 0, in nats"
        self._check("start", self.start > 0, what)
        if self.kind == "constant":
            for name in ("end", "steps"):
                self._check(name, getattr(self, name) is None, "none: a constant target is its start")
        else:
            self._check("end", self.end is not None and self.end > 0, what)
            at_least = "a number of training steps of at least 1, after which the target is its end"
            self._check("steps", self.steps is not None and self.steps >= 1, at_least)
        in_stages = self.stages >= 1 and (self.stages == 1 or self.kind == "step")
        self._check("stages", in_stages, 'a number of at least 1, and only of kind "step" another one')

    @property
    def moves(self) -> bool:
        """Whether it depends on the step."""
        return self.kind != "constant"

    def value(self, n: int) -> float:
        """In nats, or relative to H_0, after ``n`` steps."""
        if self.end is None or self.steps is None:
            return self.start
        if n >= self.steps:
            return self.end
        change = self.end - self.start
        if self.kind == "linear":
            return self.start + change * (n / self.steps)
        if self.kind == "cosine":
            return self.end - change * (1 + math.cos(math.pi * n / self.steps)) / 2
        return self.start + change * (self.stages * n // self.steps / self.stages)

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"target.{name}: found {getattr(self, name)!r}, expected {expected}")


def read(target: float | Mapping[str, Any]) -> Schedule:
    """The schedule that the option says. Raises ValueError."""
    if not isinstance(target, Mapping):
        return Schedule(kind="constant", start=target)
    check_options(target, options_of_class(Schedule), section="target", owner="a schedule")
    return Schedule(**target)


@dataclass(kw_only=True)
class Targeted(GRPO):
    """A method with a target that may move. Named last among a method's bases, so that the others' defaults hold.

    ``on_step_start`` counts the step; ``current_target`` holds from then on.
    """

    target: Target = None  # None: the method's own, where it has one
    target_metric: ClassVar[str] = "entropy/target"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="entropy/target", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="what entropy is held at in this step, where target is a schedule"),
    )  # fmt: skip
    schedule_steps: int = field(default=0, init=False)  # steps begun
    h_0: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, dict):
            read(self.target)
        elif self.target is not None:
            self.check("target", self.target > 0, "an entropy above 0, in nats")

    @property
    def own_target(self) -> Schedule | None:
        """The method's own, where ``target`` is not given."""
        return None

    @cached_property
    def schedule(self) -> Schedule | None:
        return self.own_target if self.target is None else read(self.target)

    @property
    def is_scheduled(self) -> bool:
        """Whether the target is anything but one number of nats."""
        return self.schedule is not None and (self.schedule.moves or self.schedule.relative)

    @property
    def current_target(self) -> float:
        """In nats, of the step that has begun."""
        assert self.schedule is not None
        value = self.schedule.value(max(self.schedule_steps - 1, 0))
        if not self.schedule.relative:
            return value
        assert self.h_0 is not None
        return value * self.h_0

    @property
    def controller_target(self) -> str | float:
        """For ``Controller.target``: the metric, or the number of nats."""
        return self.target_metric if self.is_scheduled else self.current_target

    @property
    def needs(self) -> Needs:
        relative = self.schedule is not None and self.schedule.relative
        return replace(super().needs, old=True) if relative else super().needs

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        report = super().on_step_start(batch, stats, reduce)
        self.schedule_steps += 1
        if self.schedule is not None and self.schedule.relative and self.h_0 is None:
            self.h_0 = self.measured(batch, stats, reduce)
        return report | {self.target_metric: self.current_target} if self.is_scheduled else report

    def measured(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> float:
        """What is compared with the target, of the whole step's ``batch`` under the policy that sampled it, in nats."""
        assert stats is not None
        value = -stats.logprob if self.measures_logprob else stats.entropy
        assert value is not None
        return token_mean(value, batch.mask, reduce)

    @property
    def measures_logprob(self) -> bool:
        """Whether the estimate by the sampled tokens' log-probs stands for the entropy."""
        return False

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.schedule is None or not self.schedule.moves:
            del state["schedule_steps"]
        if self.schedule is None or not self.schedule.relative:
            del state["h_0"]
        return state

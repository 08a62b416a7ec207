"""Finished runs of the lab, read back: curves over seeds, and what a table or a claim needs of them."""

from __future__ import annotations

import math
import statistics
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext import methods
from megatron_ext.methods.base import Controller
from megatron_ext.metrics.writer import METRICS, SAMPLES, read_steps

from ..charts import Series
from ..evaluate import load_evaluations
from .plan import BASE, EVALUATION, LABEL, LabPlan, LabRun, configuration, job_name

LIKELY = (0.5, 0.95)  # probabilities that part unlikely, likely and almost certain tokens
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Seed:
    """One finished job."""

    number: int
    records: tuple[Record, ...]
    evaluation: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """The finished seeds of one run, at least one."""

    run: LabRun
    method: str
    controller: Controller | None  # of the method, as configured
    prompts: int  # per step
    seeds: tuple[Seed, ...]

    def only(self, numbers: set[int]) -> Result:
        """The result of these seeds."""
        return replace(self, seeds=tuple(seed for seed in self.seeds if seed.number in numbers))

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.seeds[0].records]

    def curves(self, key: str) -> list[list[float | None]]:
        """``[seed][step]``."""
        return [[record.get(key) for record in seed.records] for seed in self.seeds]

    def late(self, key: str) -> list[float]:
        """Mean over the last third of the steps, per seed; empty without such a metric."""
        found = []
        for curve in self.curves(key):
            tail = [value for value in curve[len(curve) * 2 // 3 :] if value is not None]
            if tail:
                found.append(statistics.fmean(tail))
        return found

    def first(self, key: str) -> list[float]:
        return [value for curve in self.curves(key) if (value := curve[0]) is not None]

    @property
    def metrics(self) -> list[str]:
        """Names of the held-out metrics."""
        return list(self.seeds[0].evaluation["metrics"])

    def evaluated(self, metric: str) -> list[float]:
        return [seed.evaluation["metrics"][metric]["mean"] for seed in self.seeds]

    @property
    def measured(self) -> str:
        """The metric that the method compares with its target; the step's entropy of a method without a target."""
        return "entropy/full" if self.controller is None else self.controller.measured

    @property
    def targets(self) -> list[float] | None:
        """Per seed; None for a method without a target."""
        if self.controller is None:
            return None
        target = self.controller.target
        return (self.late(target) or None) if isinstance(target, str) else [float(target)] * len(self.seeds)

    @property
    def distance(self) -> list[float]:
        """(late measured - target) / target, per seed; empty without a target."""
        targets = self.targets
        return (
            [] if targets is None else [late / t - 1 for late, t in zip(self.late(self.measured), targets, strict=True)]
        )

    @property
    def saturated(self) -> list[float]:
        """Share of the last third of the steps at which a bounded output stood at its bound, per seed."""
        controller = self.controller
        if controller is None or controller.output is None or controller.bound is None:
            return []
        found = []
        for curve in self.curves(controller.output):
            tail = [value for value in curve[len(curve) * 2 // 3 :] if value is not None]
            found.append(sum(abs(value) > 0.999 * controller.bound for value in tail) / max(1, len(tail)))
        return found

    @property
    def alarms(self) -> list[str]:
        """Alarms that lasted in more than half of the late steps of some seed."""
        names = [name for name in self.seeds[0].records[-1] if name.startswith("alarm/") and name != "alarm/begun"]
        return [name.removeprefix("alarm/") for name in names if max(self.late(name), default=0.0) > 0.5]

    def series(self, key: str, color: int, name: str | None = None, *, dashed: bool = False) -> Series:
        """The mean over seeds with the band from the lowest to the highest seed."""
        columns = [[v for v in column if v is not None] for column in zip(*self.curves(key), strict=True)]
        mean = [statistics.fmean(column) if column else None for column in columns]
        low = [min(column, default=None) for column in columns]
        high = [max(column, default=None) for column in columns]
        band = (low, high) if len(self.seeds) > 1 and not dashed else None
        return Series(name or self.run.name, mean, color, dashed, band)


@dataclass(frozen=True)
class Results:
    """Everything that is finished, in the plan's order."""

    base: Mapping[str, Any] | None  # the untrained model's evaluation
    runs: Mapping[str, Result]
    baseline: str

    def family(self, name: str) -> list[Result]:
        return [result for result in self.runs.values() if result.run.family == name]

    def __getitem__(self, name: str) -> Result:
        return self.runs[name]

    def __contains__(self, name: object) -> bool:
        return name in self.runs


def load(plan: LabPlan, folder: Path) -> Results:
    """Read what is finished of the plan in the lab's folder."""
    runs = {}
    for run in plan.runs:
        folders = [folder / job_name(run.name, seed) for seed in range(plan.seeds)]
        seeds = tuple(seed for i, path in enumerate(folders) if (seed := _seed(i, path)) is not None)
        if seeds:
            length = min(len(seed.records) for seed in seeds)
            seeds = tuple(replace(seed, records=seed.records[:length]) for seed in seeds)
            config, _ = configuration(plan, run, 0, folder)
            method = methods.create(config.method)
            runs[run.name] = Result(run, config.method["name"], method.controller, config.rollout.prompts, seeds)
    return Results(_evaluation(folder / BASE), runs, plan.baseline)


def _seed(number: int, folder: Path) -> Seed | None:
    evaluation = _evaluation(folder)
    return None if evaluation is None else Seed(number, tuple(read_steps(folder / METRICS)), evaluation)


def _evaluation(folder: Path) -> Mapping[str, Any] | None:
    path = folder / EVALUATION
    return load_evaluations(path)[LABEL] if path.exists() else None


def seconds(result: Result) -> list[float]:
    """Seconds for one prompt's responses (sampled, judged, trained on), per seed: the median step's."""
    medians = [statistics.median(v for v in curve if v is not None) for curve in result.curves("time/step_s")]
    return [value / result.prompts for value in medians]


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds (0 for one seed); None without values."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def where_entropy_is(result: Result, folder: Path) -> list[tuple[float, float]]:
    """For sampled tokens of probability up to .5, up to .95 and above: share of the tokens, share of the entropy.

    From the responses that the run kept of the last third of its steps, all seeds together.
    """
    tokens, entropy = [0, 0, 0], [0.0, 0.0, 0.0]
    first = result.steps[len(result.steps) * 2 // 3]
    for seed in result.seeds:
        path = folder / job_name(result.run.name, seed.number) / SAMPLES
        for record in read_steps(path) if path.exists() else ():
            if record["step"] < first:
                continue
            for nats, logprob in zip(record["entropy"], record["logprob"], strict=True):
                place = bisect(LIKELY, math.exp(logprob or 0.0))
                tokens[place] += 1
                entropy[place] += nats or 0.0
    return [(t / max(1, sum(tokens)), e / max(1e-12, sum(entropy))) for t, e in zip(tokens, entropy, strict=True)]

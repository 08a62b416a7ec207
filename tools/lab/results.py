"""Finished runs of the lab, read back: curves over seeds, and what a table or a claim needs of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.methods.base import Controller

from ..charts import Series
from . import store
from .plan import LabPlan, LabRun

Curve = Sequence[float | None]


@dataclass(frozen=True, eq=False)
class Seed:
    """One finished training, or the untrained model. Arrays have an entry for each held-out problem."""

    number: int
    curves: Mapping[str, Curve]
    metrics: Mapping[str, float]  # held-out, means over problems
    ks: tuple[int, ...]
    length: float
    n: np.ndarray  # responses
    c: np.ndarray  # right ones
    lengths: np.ndarray  # mean tokens of a response
    data: str  # sha256 of the problems
    made: Mapping[str, str]
    tokens: Sequence[Sequence[float]] = ()

    @property
    def steps(self) -> int:
        return max(map(len, self.curves.values()), default=0)

    def first_steps(self, number: int) -> Seed:
        return replace(self, curves={key: curve[:number] for key, curve in self.curves.items()})


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
        return list(range(1, self.seeds[0].steps + 1))

    def curves(self, key: str) -> list[Curve]:
        """``[seed][step]``."""
        return [seed.curves.get(key) or [None] * seed.steps for seed in self.seeds]

    def late(self, key: str) -> list[float]:
        """Mean over the last third of the steps, per seed; empty without such a metric."""
        found = []
        for curve in self.curves(key):
            tail = [value for value in curve[len(curve) * 2 // 3 :] if value is not None]
            if tail:
                found.append(statistics.fmean(tail))
        return found

    def first(self, key: str) -> list[float]:
        return [value for curve in self.curves(key) if curve and (value := curve[0]) is not None]

    @property
    def metrics(self) -> list[str]:
        """Names of the held-out metrics."""
        return list(self.seeds[0].metrics)

    def evaluated(self, metric: str) -> list[float]:
        return [seed.metrics[metric] for seed in self.seeds]

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
    def target_curves(self) -> list[Curve] | None:
        """What ``measured`` is compared with at each step, ``[seed][step]``; None for a method without a target."""
        if self.controller is None:
            return None
        target = self.controller.target
        return self.curves(target) if isinstance(target, str) else [[float(target)] * seed.steps for seed in self.seeds]

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
        names = sorted({name for seed in self.seeds for name in seed.curves if name.startswith("alarm/")})
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

    untrained: Seed | None
    runs: Mapping[str, Result]
    baseline: str

    def family(self, name: str) -> list[Result]:
        return [result for result in self.runs.values() if result.run.family == name]

    def as_untrained(self, num_seeds: int) -> Result:
        """The untrained model as a run, its one evaluation for each of the seeds."""
        assert self.untrained is not None
        run = LabRun(store.UNTRAINED, Path())
        return Result(run, "", None, 0, tuple(replace(self.untrained, number=i) for i in range(num_seeds)))

    def __getitem__(self, name: str) -> Result:
        return self.runs[name]

    def __contains__(self, name: object) -> bool:
        return name in self.runs


def load(plan: LabPlan, out: Path) -> Results:
    """Read what the plan's runs have in the folder of results. Raises ConfigError for results of other settings."""
    runs = {}
    for run in plan.runs:
        content = store.read(plan, out, run)
        if content is not None and content["seeds"]:
            seeds = tuple(map(_seed, content["seeds"]))
            length = min(seed.steps for seed in seeds)
            seeds = tuple(seed.first_steps(length) for seed in seeds)
            controller = store.controller_of(content)
            runs[run.name] = Result(run, content["method"], controller, content["prompts"], seeds)
    untrained = store.read_untrained(out)
    return Results(None if untrained is None else _seed(untrained["seeds"][0]), runs, plan.baseline)


def _seed(content: Mapping[str, Any]) -> Seed:
    problems = content["problems"]
    return Seed(
        number=content["seed"],
        curves=content["curves"],
        metrics=content["metrics"],
        ks=tuple(int(k) for k in content["decoding"]["ks"]),
        length=content["length"],
        n=np.array(problems["n"]),
        c=np.array(problems["c"]),
        lengths=np.array(problems["length"]),
        data=content["data"],
        made=content["made"],
        tokens=content["tokens"] or (),
    )


def seconds(result: Result) -> list[float]:
    """Seconds for one prompt's responses (sampled, judged, trained on), per seed: the median step's."""
    medians = [statistics.median(v for v in curve if v is not None) for curve in result.curves("time/step_s")]
    return [value / result.prompts for value in medians]


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds (0 for one seed); None without values."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def where_entropy_is(result: Result) -> list[tuple[float, float]]:
    """For sampled tokens of probability up to .5, up to .95 and above: share of the tokens, share of the entropy.

    All seeds together (store.py counts them).
    """
    counts = [list(part) for part in zip(*(seed.tokens for seed in result.seeds if seed.tokens), strict=True)]
    if not counts:
        return [(0.0, 0.0)] * (len(store.LIKELY) + 1)
    tokens, entropy = ([sum(pair[i] for pair in part) for part in counts] for i in (0, 1))
    return [(t / max(1, sum(tokens)), e / max(1e-12, sum(entropy))) for t, e in zip(tokens, entropy, strict=True)]

"""How a run follows its target, which may move: three numbers of what was measured and what it was compared with.

All go step by step, over the steps that have both; errors are shares of the step's own target.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from .results import Curve, Result

T = TypeVar("T")
WITHIN = 0.1  # of the target: where a run has settled


def tracking_error(measured: Curve, target: Curve) -> float | None:
    """Mean of |measured - target| / target over the last third of the steps; None where no step has both."""
    errors = [abs(error) for _, error in late(measured, target)]
    return statistics.fmean(errors) if errors else None


def overshoot(measured: Curve, target: Curve) -> float | None:
    """The largest excess beyond the target after it was first reached: below it for a run that begins above, above it
    for one that begins below. 0 where it stays on its side; None where it never reaches the target, or begins on it and
    so comes from neither side."""
    steps = errors_of(measured, target)
    if not steps or steps[0][1] == 0:
        return None
    side = 1 if steps[0][1] > 0 else -1
    beyond = [-side * error for _, error in steps]
    reached = next((i for i, excess in enumerate(beyond) if excess >= 0), None)
    return None if reached is None else max(0.0, *beyond[reached:])


def settling_step(measured: Curve, target: Curve) -> int | None:
    """The first step, counted from 1, from which on every step is within WITHIN of its target; None where the last one
    is not."""
    settled = None
    for step, error in reversed(errors_of(measured, target)):
        if abs(error) > WITHIN:
            break
        settled = step
    return settled


def errors_of(measured: Curve, target: Curve) -> list[tuple[int, float]]:
    """``(step, (measured - target) / target)`` of the steps that have both, counted from 1."""
    pairs = enumerate(zip(measured, target, strict=True), 1)
    return [(step, m / t - 1) for step, (m, t) in pairs if m is not None and t]


def late(measured: Curve, target: Curve) -> list[tuple[int, float]]:
    """Of the last third of the steps."""
    return [each for each in errors_of(measured, target) if each[0] > len(measured) * 2 // 3]


def of_seeds(measure: Callable[[Curve, Curve], T], run: Result) -> Sequence[T]:
    """What ``measure`` finds in each seed; nothing of a method without a target."""
    targets = run.target_curves
    if targets is None:
        return []
    return [measure(m, t) for m, t in zip(run.curves(run.measured), targets, strict=True)]

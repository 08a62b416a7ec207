"""How a run follows its target, which may move: three numbers of what was measured and what it was compared with.

Errors are shares of the target, of steps that have both. The tracking error goes step by step and holds each step's own
noise (in the league a standard deviation of 6 to 9 % of the entropy of 256 responses, 13 to 19 % of that of 64, by the
differences of neighbouring late steps of grpo, aec and entropic). Overshoot and settling would be decided by the
luckiest or unluckiest step, so they go by means over windows, a twelfth of the run each: in runs of many small and of
few large steps these have equally many responses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from .results import Curve, Result

T = TypeVar("T")
ENTROPY = "entropy/full"
WITHIN = 0.1  # of the target: where a run is at it
SAME = 0.02  # relative: late means of one and the same entropy
WINDOWS = 12  # of a run; a shorter one has a window a step


def tracking_error(measured: Curve, target: Curve) -> float | None:
    """Mean of |measured - target| / target over the last third of the steps; None where no step has both."""
    errors = [abs(error) for _, error in late(measured, target)]
    return statistics.fmean(errors) if errors else None


def overshoot(measured: Curve, target: Curve) -> float | None:
    """The largest excess of a window beyond the target after it was first reached: below it for a run that begins
    above, above it for one that begins below. 0 where it stays on its side; None where it never reaches the target, or
    begins within WITHIN of it and so comes from neither side."""
    found = windows(measured, target)
    if not found or abs(found[0][1]) <= WITHIN:
        return None
    side = 1 if found[0][1] > 0 else -1
    beyond = [-side * error for _, error in found]
    reached = next((i for i, excess in enumerate(beyond) if excess >= 0), None)
    return None if reached is None else max(0.0, *beyond[reached:])


def settling_step(measured: Curve, target: Curve) -> int | None:
    """The first step, counted from 1, of the windows from which on all are within WITHIN of their target; None where
    that is not all of the last third: a curve that crosses its target at the end has not settled."""
    settled = None
    for step, error in reversed(windows(measured, target)):
        if abs(error) > WITHIN:
            break
        settled = step
    return None if settled is None or settled > len(measured) * 2 // 3 + 1 else settled


def windows(measured: Curve, target: Curve) -> list[tuple[int, float]]:
    """``(first step, error of the means)`` of each window that has steps with both."""
    length = max(1, len(measured) // WINDOWS)
    found = []
    for first in range(0, len(measured), length):
        both = zip(measured[first : first + length], target[first : first + length], strict=True)
        pairs = [(m, t) for m, t in both if m is not None and t]
        if pairs:
            found.append((first + 1, math.fsum(m for m, _ in pairs) / math.fsum(t for _, t in pairs) - 1))
    return found


def errors_of(measured: Curve, target: Curve) -> list[tuple[int, float]]:
    """``(step, (measured - target) / target)`` of the steps that have both, counted from 1."""
    pairs = enumerate(zip(measured, target, strict=True), 1)
    return [(step, m / t - 1) for step, (m, t) in pairs if m is not None and t]


def late(measured: Curve, target: Curve) -> list[tuple[int, float]]:
    """Of the last third of the steps."""
    return [each for each in errors_of(measured, target) if each[0] > len(measured) * 2 // 3]


def uncontrolled_error(run: Result, baseline: Result | None) -> list[float]:
    """The tracking error that ``baseline`` has without trying, by the seeds that both have: of its entropy against the
    run's target. Nothing of a method without a target, or that measures another entropy than the step's."""
    targets = run.target_curves
    if targets is None or baseline is None or baseline is run or not _measures_entropy(run):
        return []
    others = {seed.number: seed.curves.get(ENTROPY) for seed in baseline.seeds}
    pairs = [(others.get(seed.number), target) for seed, target in zip(run.seeds, targets, strict=True)]
    errors = [tracking_error(measured, target) for measured, target in pairs if measured is not None]
    return [error for error in errors if error is not None]


def _measures_entropy(run: Result) -> bool:
    """Whether what it controls is the step's entropy, up to what mini-batches of a step differ from the whole."""
    own, entropy = run.late(run.measured), run.late(ENTROPY)
    return len(own) == len(entropy) and all(abs(a / b - 1) < SAME for a, b in zip(own, entropy, strict=True))


def of_seeds(measure: Callable[[Curve, Curve], T], run: Result) -> Sequence[T]:
    """What ``measure`` finds in each seed; nothing of a method without a target."""
    targets = run.target_curves
    if targets is None:
        return []
    return [measure(m, t) for m, t in zip(run.curves(run.measured), targets, strict=True)]

"""Rules that decide a claim: from the finished seeds of its runs to one effect with its interval.

``RULES`` has them by the names of recipes/lab/claims.toml. A rule of two runs compares the first with the second, seed
by seed; a positive effect is what the claim says. "Late" means the last third of the steps, entropy is the mean over a
step's response tokens and the whole vocabulary in nats, "right answers" is the share of a step's responses that are
right, whatever the method adds to the reward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ext.metrics.eval_stats import pass_at_k as estimate

from .intervals import Effect, over_seeds, over_seeds_and_problems
from .results import Curve, Result, Seed

ENTROPY, RIGHT, STAGE = "entropy/full", "reward/outcome/correct", "data/stage"
RATIO, MISMATCH = "mismatch/ratio", "mismatch/mean"
WINDOW = 5  # first steps of a run
LEVELS = 10  # of right answers at which two runs are compared
Unit = Literal["nats", "points", "percent", "ratio", "small nats"]


@dataclass(frozen=True)
class Criterion:
    """``said`` in words, of the names {0} and {1}, {margin} and the rule's options. ``measure`` and ``shown`` take the
    runs' results with equal seeds, and the options. ``within``: the claim is that the effect is small. ``untrained``:
    the second run may be the untrained model. ``null``: may be asked of two runs that have no target."""

    said: str
    unit: Unit
    num_runs: int
    measure: Callable[..., Effect]
    shown: Callable[..., str]
    within: bool = False
    untrained: bool = False
    null: bool = False


# --- entropy ---


def late_entropy(a: Result, b: Result) -> Effect:
    return over_seeds(_minus(a.late(ENTROPY), b.late(ENTROPY)))


def kept(run: Result) -> list[float]:
    """Late entropy as a share of the first step's, per seed."""
    return [late / first for late, first in zip(run.late(ENTROPY), run.first(ENTROPY), strict=True)]


def kept_entropy(a: Result, b: Result) -> Effect:
    return over_seeds(_minus(kept(a), kept(b)))


def entropy_at_equal_reward(a: Result, b: Result) -> Effect:
    """Entropy where both answer equally well: see ``at_equal_reward``."""
    curves = zip(a.curves(RIGHT), a.curves(ENTROPY), b.curves(RIGHT), b.curves(ENTROPY), strict=True)
    return over_seeds([at_equal_reward(*each)[0] for each in curves])


def at_equal_reward(right_a: Curve, entropy_a: Curve, right_b: Curve, entropy_b: Curve) -> tuple[float, float]:
    """Mean difference of entropies, a - b, at equal right answers; the highest level compared.

    A run's steps are pooled until its right answers only rise (isotonic regression), its entropy over the same steps;
    between the pools it is interpolated. The LEVELS levels lie evenly in the upper half of what both runs reach:
    between the better of their first WINDOW steps and the lower of their last thirds. (The steps at which noisy curves
    first reach a level come too early, and the earlier the slower a run learns: that favours the one that learns less.)
    """
    runs = [paired(right, entropy) for right, entropy in ((right_a, entropy_a), (right_b, entropy_b))]
    start = max(statistics.fmean(right[:WINDOW]) for right, _ in runs)
    top = min(statistics.fmean(right[len(right) * 2 // 3 :]) for right, _ in runs)
    levels = np.linspace(min((start + top) / 2, top), top, LEVELS)
    a, b = (np.interp(levels, *pooled_until_rising(right, entropy)) for right, entropy in runs)
    return float((a - b).mean()), top


def paired(right: Curve, entropy: Curve) -> tuple[list[float], list[float]]:
    """Both curves without the steps at which one is missing. Raises StatisticsError where none is left."""
    pairs = [(x, y) for x, y in zip(right, entropy, strict=True) if x is not None and y is not None]
    if not pairs:
        raise statistics.StatisticsError("no step has right answers and entropy")
    return [x for x, _ in pairs], [y for _, y in pairs]


def pooled_until_rising(right: Sequence[float], entropy: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of both over pools of neighbouring steps, the fewest merged that make those of ``right`` rise strictly."""
    pools = list[tuple[float, float, int]]()  # sums of right and entropy, steps
    for pool in zip(right, entropy, [1] * len(right), strict=True):
        while pools and pools[-1][0] / pools[-1][2] >= pool[0] / pool[2]:
            x, y, n = pools.pop()
            pool = (x + pool[0], y + pool[1], n + pool[2])
        pools.append(pool)
    return [x / n for x, _, n in pools], [y / n for _, y, n in pools]


def second_stage(a: Result, b: Result) -> Effect:
    """A difference in differences: how much the entropy of ``a`` rises from the last third of the first stage to the
    second stage, less what that of ``b`` does in the same steps."""
    switch = switch_of(a)
    rises = [[rise(curve, switch) for curve in run.curves(ENTROPY)] for run in (a, b)]
    return over_seeds(_minus(*rises))


def switch_of(run: Result) -> int:
    """Steps before the second stage of a curriculum; half of them in a run without stages."""
    stages = run.curves(STAGE)[0]
    return next((i for i, stage in enumerate(stages) if (stage or 0) >= 1), len(stages) // 2)


def rise(curve: Curve, switch: int) -> float:
    before, after = curve[switch * 2 // 3 : switch], curve[switch:]
    return statistics.fmean(v for v in after if v is not None) - statistics.fmean(v for v in before if v is not None)


def rises(run: Result, alarm: str) -> Effect:
    """Late entropy above the first step's. A seed whose alarm does not last at the end counts as no rise."""
    lasting = run.late(f"alarm/{alarm}") or [0.0] * len(run.seeds)
    changes = _minus(run.late(ENTROPY), run.first(ENTROPY))
    return over_seeds([change if on > 0.99 else min(change, 0.0) for change, on in zip(changes, lasting, strict=True)])


# --- targets ---


def holds_target(run: Result) -> Effect:
    return over_seeds(run.distance)


def closer_to_target(a: Result, b: Result) -> Effect:
    return over_seeds([abs(y) - abs(x) for x, y in zip(a.distance, b.distance, strict=True)])


# --- engine and trainer ---


def ratio_error(a: Result, b: Result) -> Effect:
    """How much further the late probability ratio, trainer to engine, of ``b`` is from 1 than that of ``a``."""
    return over_seeds(_minus(*([abs(ratio - 1) for ratio in run.late(RATIO)] for run in (b, a))))


def mismatch(a: Result, b: Result) -> Effect:
    """How much more nats a token engine and trainer are apart in ``b`` than in ``a``, late."""
    return over_seeds(_minus(b.late(MISMATCH), a.late(MISMATCH)))


# --- held-out problems ---


def avg_at_k(a: Result, b: Result) -> Effect:
    return over_seeds_and_problems(_per_problem(a, b, lambda seed: seed.c / seed.n))


def pass_at_k(a: Result, b: Result, k: int) -> Effect:
    def passed(seed: Seed) -> np.ndarray:
        return np.array([estimate(int(n), int(c), k) for n, c in zip(seed.n, seed.c, strict=True)])

    return over_seeds_and_problems(_per_problem(a, b, passed))


def _per_problem(a: Result, b: Result, value: Callable[[Seed], np.ndarray]) -> np.ndarray:
    """``[seeds, problems]``, a - b. Raises ValueError for other problems."""
    pairs = list(zip(a.seeds, b.seeds, strict=True))
    if any(x.data != y.data for x, y in pairs):
        raise ValueError(f"{a.run.name} and {b.run.name} were evaluated on other problems: compare runs of one lab")
    return np.stack([value(x) - value(y) for x, y in pairs])


# --- in words ---


def _late_shown(a: Result, b: Result) -> str:
    return f"{_nats(a.late(ENTROPY))} against {_nats(b.late(ENTROPY))}"


def _kept_shown(a: Result, b: Result) -> str:
    return f"{_share(kept(a))} of the first step's entropy against {_share(kept(b))}"


def _equal_shown(a: Result, b: Result) -> str:
    curves = zip(a.curves(RIGHT), a.curves(ENTROPY), b.curves(RIGHT), b.curves(ENTROPY), strict=True)
    top = statistics.fmean(at_equal_reward(*each)[1] for each in curves)
    late = f"late {_share(a.late(RIGHT))} and {_share(b.late(RIGHT))}"
    return f"compared up to {top:.0%} right answers ({late})"


def _stage_shown(a: Result, b: Result) -> str:
    switch = switch_of(a)
    changes = [statistics.fmean(rise(curve, switch) for curve in run.curves(ENTROPY)) for run in (a, b)]
    return f"{changes[0]:+.3f} against {changes[1]:+.3f} nats, from step {switch + 1} on"


def _target_shown(*runs: Result) -> str:
    parts = []
    for run in runs:
        part = f"{run.run.name} {statistics.fmean(run.distance):+.1%} from it"
        if run.saturated:
            part += f", output at its bound in {statistics.fmean(run.saturated):.0%} of late steps"
        parts.append(f"{part}, {statistics.fmean(run.late('response/length')):.0f} tokens a response")
    return "; ".join(parts)


def _avg_shown(a: Result, b: Result) -> str:
    return " against ".join(_share([float((seed.c / seed.n).mean()) for seed in run.seeds]) for run in (a, b))


def _pass_shown(a: Result, b: Result, k: int) -> str:
    return " against ".join(_share([seed.metrics[f"pass@{k}"] for seed in run.seeds]) for run in (a, b))


def _late_of(key: str) -> Callable[[Result, Result], str]:
    def shown(a: Result, b: Result) -> str:
        return " against ".join(f"{statistics.fmean(run.late(key)):.6f}" for run in (a, b))

    return shown


def _rises_shown(run: Result, alarm: str) -> str:
    right = f"{_share(run.late(RIGHT))} right answers"
    return f"{_nats(run.first(ENTROPY))} to {_nats(run.late(ENTROPY))} nats, {right}"


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _nats(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}"


def _share(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1%}"


RULES = {
    "late_entropy": Criterion(
        "late entropy of {0} above {1}'s, whatever their accuracy", "nats", 2, late_entropy, _late_shown, null=True
    ),
    "entropy_at_equal_reward": Criterion(
        "entropy of {0} above {1}'s where both give equally many right answers in training",
        "nats", 2, entropy_at_equal_reward, _equal_shown, null=True,
    ),
    "kept_entropy": Criterion(
        "late / first entropy of {0} above {1}'s", "points", 2, kept_entropy, _kept_shown, null=True
    ),
    "second_stage": Criterion(
        "entropy of {0} rises more from the end of the first stage to the second than {1}'s in the same steps",
        "nats", 2, second_stage, _stage_shown, null=True,
    ),
    "rises": Criterion(
        "late entropy of {0} above the first step's, with alarm {alarm} at the end", "nats", 1, rises, _rises_shown
    ),
    "holds_target": Criterion(
        "late mean of what {0} controls within {margin} of the target", "percent", 1, holds_target, _target_shown,
        within=True,
    ),
    "closer_to_target": Criterion(
        "late mean of {0} closer to the target than {1}'s", "percent", 2, closer_to_target, _target_shown
    ),
    "ratio_error": Criterion(
        "late probability ratio of {0} closer to 1 than {1}'s", "ratio", 2, ratio_error, _late_of(RATIO),
        null=True,
    ),
    "mismatch": Criterion(
        "late difference of engine and trainer in {0} below {1}'s", "small nats", 2, mismatch, _late_of(MISMATCH),
        null=True,
    ),
    "avg_at_k": Criterion(
        "held-out avg@16 of {0} above {1}'s", "points", 2, avg_at_k, _avg_shown, untrained=True, null=True
    ),
    "pass_at_k": Criterion(
        "held-out pass@{k} of {0} above {1}'s", "points", 2, pass_at_k, _pass_shown, untrained=True, null=True
    ),
}  # fmt: skip

"""What a few seeds can say: an effect with its 95 % interval, and p-values corrected for many claims.

An effect is a difference (or a distance) that every seed measures once. Seeds are the unit: the steps of a run and the
problems of an evaluation share its luck, and counting them as independent would find differences between two runs of
one method. With four seeds a percentile bootstrap over seeds covers the truth far less than it says (it cannot leave
the range of four numbers); Student's t with three degrees of freedom is exact for normal seeds.

Of a held-out metric there is a second sampling, the problems: another 200 could have been drawn. The differences
``d[seed, problem]`` are a two-way table, and the variance of its mean is estimated by the sum

    error^2 = var_s(mean_p d) / S + var_p(mean_s d) / P.

It counts the noise of single responses twice, once in each term, and keeps the S - 1 degrees of freedom of the seeds
(Welch and Satterthwaite's larger number covered 93.6 % in the third line below): it errs to the safe side.

Coverage of a true difference of 0, in percent, and of a percentile bootstrap over the seeds beside it: 4 seeds, 200
problems, 16 responses each, 2,000 draws each (the spread of seeds in points of accuracy, that of problems' own
preferences between the two methods in points):

    seeds' spread  problems' spread  this interval  bootstrap over seeds
               0%                0%         100.0%                 79.9%
               1%                0%          99.9%                 79.3%
               3%                0%          97.2%                 78.6%
               0%               10%         100.0%                 58.6%
               1%               10%         100.0%                 69.0%
               3%               10%          98.8%                 76.7%

``python -m tools.lab.intervals`` prints the table anew. tests/tools/lab/test_intervals.py repeats it with fewer draws.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mpmath
import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """A mean over seeds. ``error`` is its standard error with ``df`` degrees of freedom; infinite for one seed."""

    seeds: tuple[float, ...]  # what each seed measured
    mean: float
    error: float
    df: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, two-sided."""
        half = self.error * quantile(self.df) if math.isfinite(self.error) else math.inf
        return self.mean - half, self.mean + half

    def p_above(self, limit: float) -> float:
        """Two-sided p-value of the hypothesis "the effect is ``limit``"; 1 where the mean is not above it."""
        if self.mean <= limit or not math.isfinite(self.error):
            return 1.0
        return two_sided((self.mean - limit) / self.error, self.df) if self.error > 0 else 0.0


def over_seeds(values: Sequence[float]) -> Effect:
    """Of one number a seed: Student's t. Raises ValueError without seeds."""
    if not values:
        raise ValueError("an effect needs at least one seed")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Effect(tuple(values), mean, math.inf, 1)
    return Effect(tuple(values), mean, statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def over_seeds_and_problems(differences: np.ndarray) -> Effect:
    """Of a difference ``[seeds, problems]`` for every problem: both are samples. Raises ValueError if one is empty."""
    if differences.ndim != 2 or 0 in differences.shape:
        raise ValueError(
            f"differences of seeds and problems: expected two axes with entries, found {differences.shape}"
        )
    seeds, problems = differences.mean(1), differences.mean(0)
    mean = float(differences.mean())
    if len(seeds) == 1 or len(problems) == 1:
        return Effect(tuple(map(float, seeds)), mean, math.inf, 1)
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (seeds, problems))
    return Effect(tuple(map(float, seeds)), mean, math.sqrt(variance), len(seeds) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: what falls below .05 does so for all of them together."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values, in the given order: of what falls below .05, 5 % at most is chance
    on average. A few seeds cannot reach Holm's levels for hundreds of comparisons: with three degrees of freedom .05 of
    170 takes 19 standard errors."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__, reverse=True)
    adjusted, smallest = [0.0] * len(p_values), 1.0
    for rank, i in enumerate(order):
        smallest = min(smallest, len(p_values) / (len(p_values) - rank) * p_values[i])
        adjusted[i] = smallest
    return adjusted


def two_sided(t: float, df: int) -> float:
    """P(|T| > t) of Student's t, by the regularised incomplete beta function."""
    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


@cache
def quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t that ``1 - confidence`` of |T| exceeds."""
    low, high = 0.0, 2.0
    while two_sided(high, df) > 1 - confidence:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > 1 - confidence else (low, middle)
    return high


# --- does it cover? ---

SPREADS = ((0.0, 0.0), (0.01, 0.0), (0.03, 0.0), (0.0, 0.1), (0.01, 0.1), (0.03, 0.1))  # of seeds, of problems


def drawn_differences(
    rng: np.random.Generator, seed_spread: float, problem_spread: float, *, seeds: int = 4, problems: int = 200
) -> np.ndarray:
    """``[seeds, problems]``: two methods of equal accuracy, 16 responses a problem. A problem's own difference
    ``problem_spread`` and a run's ``seed_spread`` are standard deviations around 0."""
    difficulty = rng.beta(0.7, 1.2, problems)
    own = rng.normal(0, problem_spread, problems)
    shares = []
    for sign in (0.5, -0.5):
        luck = rng.normal(0, seed_spread / math.sqrt(2), (seeds, 1))
        shares.append(rng.binomial(16, np.clip(difficulty + sign * own + luck, 0, 1)) / 16)
    return shares[0] - shares[1]


def coverage(seed_spread: float, problem_spread: float, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """How often the interval of ``over_seeds_and_problems`` holds 0, and a percentile bootstrap over seeds does."""
    held, bootstrapped = 0, 0
    for _ in range(draws):
        differences = drawn_differences(rng, seed_spread, problem_spread)
        low, high = over_seeds_and_problems(differences).interval
        held += low <= 0 <= high
        means = differences.mean(1)
        resampled = means[rng.integers(0, len(means), (400, len(means)))].mean(1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        bootstrapped += low <= 0 <= high
    return held / draws, bootstrapped / draws


def table(draws: int) -> str:
    rng = np.random.default_rng(0)
    lines = ["    seeds' spread  problems' spread  this interval  bootstrap over seeds"]
    for seed_spread, problem_spread in SPREADS:
        held, bootstrapped = coverage(seed_spread, problem_spread, draws, rng)
        lines.append(f"    {seed_spread:13.0%}  {problem_spread:16.0%}  {held:13.1%}  {bootstrapped:20.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(int(sys.argv[1]) if sys.argv[1:] else 2000))

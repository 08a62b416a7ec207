"""The statistics of an evaluation: avg@k, pass@k, maj@k and what chance does to them.

Pure functions of counts and strings: no model, no verifier, no file. A problem was sampled ``n`` times and
``c`` of the responses were correct. Intervals are percentile bootstraps over problems, which is the sampling
that a benchmark of 30 problems suffers from; the randomness of the responses is inside ``c / n``.
Axes: ``P`` problems, ``M`` metrics, ``R`` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
DECODING = ("temperature", "top_p", "max_response_tokens")  # what makes two evaluations two questions
BLOCK = 4_000_000  # counts held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean over problems with its confidence interval."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that ``k`` of the ``n`` responses, drawn without replacement, hold a correct one.

    ``1 - C(n-c, k) / C(n, k)``, which is 1 when fewer than ``k`` are wrong (Chen et al., arXiv 2107.03374, eq. 1).
    The quotient is of exact integers, so nothing overflows or cancels. Raises ValueError when not ``0 <= c <= n >= k``.
    """
    _check_counts(n, c)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, found n = {n} responses: draw more or ask for a smaller k")
    every = math.comb(n, k)
    return (every - math.comb(n - c, k)) / every


def avg_at_k(n: int, c: int) -> float:
    """Share of correct responses of one problem; the benchmark's avg@k is its mean over problems."""
    _check_counts(n, c)
    return c / n


def clusters(answers: Sequence[str | None], equivalent: Callable[[str, str], bool]) -> list[list[int]]:
    """Positions of equivalent answers together, clusters in the order of their first member.

    An answer joins the first cluster whose first-seen member (its key) it is equivalent to, asked as
    ``equivalent(key, answer)``. Equivalence of verifiers is not transitive: the key rule makes the result
    well defined. ``None`` (nothing could be extracted) joins no cluster.
    """
    found: list[list[int]] = []
    for position, answer in enumerate(answers):
        if answer is None:
            continue
        for members in found:
            key = answers[members[0]]
            if key is not None and (key == answer or equivalent(key, answer)):
                members.append(position)
                break
        else:
            found.append([position])
    return found


def majority(answers: Sequence[str | None], equivalent: Callable[[str, str], bool]) -> int | None:
    """Position of the key of the largest cluster, ties to the earliest; None when no answer could be extracted.

    maj@k of the problem is whether that response is correct, 0 for None.
    """
    found = clusters(answers, equivalent)
    return max(found, key=len)[0] if found else None  # max keeps the first of equals


def winners(votes: Sequence[Sequence[str | None]], equal: Sequence[set[tuple[str, str]]]) -> list[int | None]:
    """For each problem which response is the first with the majority's answer; None where nobody answered.

    ``equal``: of each problem the pairs ``(key, answer)`` of different texts that are equal.
    """
    return [
        majority(row, lambda key, answer, known=known: (key, answer) in known)
        for row, known in zip(votes, equal, strict=True)
    ]


def bootstrap(values_PM: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Interval]:
    """Mean and 95 % interval over problems of each of ``M`` metrics, ``values_PM`` ``[P, M]``.

    All metrics share the resamples. Raises ValueError for an empty or non-finite table.
    """
    values_PM = np.asarray(values_PM, dtype=np.float64)
    if values_PM.ndim != 2 or not len(values_PM):
        raise ValueError(f"bootstrap: expected values [problems, metrics] of at least one problem, {values_PM.shape}")
    if not np.isfinite(values_PM).all():
        raise ValueError("bootstrap: found a value that is not finite; leave the problem out and say so")
    means_RM = _resampled_means(values_PM, seed, resamples)
    tail = (1 - CONFIDENCE) / 2
    low_M, high_M = np.quantile(means_RM, [tail, 1 - tail], axis=0)
    return [
        Interval(float(mean), float(low), float(high))
        for mean, low, high in zip(values_PM.mean(axis=0), low_M, high_M, strict=True)
    ]


@dataclass(frozen=True)
class Difference:
    """``b - a`` over the same problems; ``p_value`` is two-sided, for the hypothesis that it is 0."""

    interval: Interval
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval leaves 0 out."""
        return self.interval.low > 0 or self.interval.high < 0


def paired_bootstrap(
    a_P: Sequence[float], b_P: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The difference ``mean(b) - mean(a)`` of two evaluations whose values belong to the same problems, in order.

    Problems are resampled once for both, so what makes a problem hard cancels. The p-value counts the resamples
    on the far side of 0, with the observation itself (hence never 0). Raises ValueError for unequal lengths.
    """
    difference_P = _paired(a_P, b_P)
    means_R = _resampled_means(difference_P[:, None], seed, resamples)[:, 0]
    return _difference(float(difference_P.mean()), means_R)


def average(sets: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over sets of each set's mean over its problems, each set counting alike, with its interval.

    Problems are resampled within each set, independently of the other sets.
    """
    values = [np.asarray(values_P, dtype=np.float64) for values_P in sets]
    mean = float(np.mean([values_P.mean() for values_P in values]))
    return _interval(mean, _resampled_averages(values, seed, resamples))


def average_difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The difference of two ``average`` over the same problems, paired as in ``paired_bootstrap`` within each set."""
    values = [_paired(a_P, b_P) for a_P, b_P in zip(a, b, strict=True)]
    mean = float(np.mean([values_P.mean() for values_P in values]))
    return _difference(mean, _resampled_averages(values, seed, resamples))


def per_problem(rows: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> dict[str, list[float]]:
    """``avg@n``, ``pass@k`` and ``maj@n`` of each problem, from rows with ``n``, ``c`` and ``majority``."""
    n = rows[0]["n"]
    return {
        f"avg@{n}": [avg_at_k(row["n"], row["c"]) for row in rows],
        **{f"pass@{k}": [pass_at_k(row["n"], row["c"], k) for row in rows] for k in ks},
        f"maj@{n}": [float(row["majority"]) for row in rows],
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Difference]:
    """``b - a`` for every metric that both evaluations (as tools.evaluate writes them) report.

    Raises ValueError when they are of different data, problems or decoding: only what is asked alike can be paired.
    """
    if a["data"]["sha256"] != b["data"]["sha256"]:
        raise ValueError(f"the evaluations are of different data: {a['data']['path']} and {b['data']['path']}")
    if [row["id"] for row in a["problems"]] != [row["id"] for row in b["problems"]]:
        raise ValueError(
            f"the evaluations are of different problems ({len(a['problems'])} and {len(b['problems'])} of "
            f"{a['data']['path']}): repeat one of them with the same --limit and --max-prompt-tokens"
        )
    asked = [{name: item["decoding"][name] for name in DECODING if name in item["decoding"]} for item in (a, b)]
    if other := [name for name in asked[0].keys() & asked[1].keys() if asked[0][name] != asked[1][name]]:
        listed = ", ".join(f"{name} {asked[0][name]:g} and {asked[1][name]:g}" for name in sorted(other))
        raise ValueError(f"the evaluations are of different decoding ({listed}): repeat one of them as the other")
    first, second = (per_problem(item["problems"], item["decoding"]["ks"]) for item in (a, b))
    return {name: paired_bootstrap(first[name], second[name]) for name in first if name in second}


def _paired(a_P: Sequence[float], b_P: Sequence[float]) -> np.ndarray:
    if len(a_P) != len(b_P) or not len(a_P):
        raise ValueError(f"paired bootstrap: {len(a_P)} and {len(b_P)} problems; expected the same problems in order")
    difference_P = np.asarray(b_P, dtype=np.float64) - np.asarray(a_P, dtype=np.float64)
    if not np.isfinite(difference_P).all():
        raise ValueError("paired bootstrap: found a value that is not finite; leave the problem out and say so")
    return difference_P


def _interval(mean: float, means_R: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def _difference(mean: float, means_R: np.ndarray) -> Difference:
    below, above = int((means_R <= 0).sum()), int((means_R >= 0).sum())
    return Difference(_interval(mean, means_R), min(1.0, 2 * (min(below, above) + 1) / (len(means_R) + 1)))


def _resampled_averages(sets: Sequence[np.ndarray], seed: int, resamples: int) -> np.ndarray:
    """``[R]``: means over sets of their resampled means; every set has random numbers of its own."""
    means = [_resampled_means(values_P[:, None], seed + i, resamples)[:, 0] for i, values_P in enumerate(sets)]
    return np.mean(means, axis=0)


def _resampled_means(values_PM: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of ``resamples`` draws of P problems with replacement, ``[R, M]``.

    How often each problem is drawn is multinomial, so the means are one matrix product per block.
    """
    generator = np.random.default_rng(seed)
    problems = len(values_PM)
    block = max(1, BLOCK // problems)
    uniform = np.full(problems, 1 / problems)
    parts = []
    for start in range(0, resamples, block):
        counts_RP = generator.multinomial(problems, uniform, size=min(block, resamples - start))
        parts.append(counts_RP @ values_PM / problems)
    return np.concatenate(parts)


def _check_counts(n: int, c: int) -> None:
    if n < 1 or not 0 <= c <= n:
        raise ValueError(f"counts: expected 0 <= c <= n with n >= 1, found n = {n}, c = {c}")

"""A league's table: each run of a regime with its numbers, and whether its answers differ from the baseline's.

A comparison is of one regime, seed by seed and problem by problem, with the interval of intervals.py. A tuned run is
compared with the tuned baseline, whose own tuning is compared with its paper's values. ``league`` reads every regime
once and corrects all comparisons together; the null control's, and those of a run that is another's to the bit, are
shown and not counted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from megatron_ext.metrics.eval_stats import pass_at_k as estimate

from .claims import NOT_DECIDED, OPPOSITE, SHOWS, p_value, verdict_of
from .following import ENTROPY, of_seeds, overshoot, settling_step, tracking_error, uncontrolled_error
from .intervals import CONFIDENCE, Effect, false_discovery
from .page import cell, pace
from .plan import LabPlan, LabRun
from .regimes import in_regime
from .results import Result, Results, Seed
from .rules import avg_at_k, pass_at_k
from .tuning import tuned_name

HIGHER, LOWER = "higher", "lower"
WORDS = {SHOWS: HIGHER, OPPOSITE: LOWER, NOT_DECIDED: NOT_DECIDED}
RIGHT, LENGTH = "reward/outcome/correct", "response/length"
ANSWERS = 0.01  # avg@k from which on a sharpening tax is told


@dataclass(frozen=True)
class Comparison:
    """Of held-out answers, run less baseline, as shares. ``survives``: the correction for all of the page."""

    effect: Effect
    verdict: str
    p: float
    survives: bool = False


@dataclass(frozen=True)
class Row:
    """A run of a regime. Comparisons are None for the baseline itself, and where no seed is in both."""

    result: Result
    setting: str  # in words
    avg: Comparison | None = None
    passed: Comparison | None = None
    beyond_untrained: Comparison | None = None  # pass@k less that of the untrained model
    same_as: str = ""  # an earlier run of the plan with the same entropies and answers, to the bit
    is_null: bool = False  # the baseline once more
    repeats: bool = False  # a run whose own values were chosen, once more: beside the tuned baseline


def league(plan: LabPlan, results: Results) -> dict[str, list[Row]]:
    """By regime, ranked by held-out avg@k alone; runs that only some regimes have for themselves are not in it."""
    found = {regime.name: _rows(plan, results, regime.name) for regime in plan.regimes}
    counted = [
        comparison
        for rows in found.values()
        for row in rows
        if not row.is_null and not row.same_as
        for comparison in (row.avg, row.passed)
        if comparison is not None and math.isfinite(comparison.effect.error)
    ]
    adjusted = false_discovery([comparison.p for comparison in counted])
    survive = {id(each) for each, p in zip(counted, adjusted, strict=True) if p < 1 - CONFIDENCE}

    def corrected(comparison: Comparison | None) -> Comparison | None:
        return comparison and replace(comparison, survives=id(comparison) in survive)

    return {
        regime: [replace(row, avg=corrected(row.avg), passed=corrected(row.passed)) for row in rows]
        for regime, rows in found.items()
    }


def _rows(plan: LabPlan, results: Results, regime: str) -> list[Row]:
    members = [results[run.name] for run in plan.runs if is_member(run, regime) and run.name in results]
    nulls = null_controls(plan)
    tuned_baseline = results.runs.get(in_regime(tuned_name(plan.baseline), regime))
    rows = []
    for number, result in enumerate(members):
        its_own = result.run.base in (result.method, *nulls) or result.run.setting == "tuned"
        row = Row(
            result,
            setting_of(plan, result.run) if its_own else "see Settings",
            is_null=result.run.base in nulls,
            same_as=next((other.run.base for other in members[:number] if is_same(other, result)), ""),
            beyond_untrained=_beyond_untrained(result, results),
        )
        rows.append(_beside(row, compared_with(plan, results, result.run)))
        if tuned_baseline is not None and is_tuned_alike(plan, result.run):
            rows.append(_beside(Row(result, "tuned: its own values", repeats=True), tuned_baseline))
    return sorted(rows, key=lambda row: -statistics.fmean(row.result.evaluated(avg_metric(row.result))))


def _beside(row: Row, baseline: Result | None) -> Row:
    """The row with its differences from ``baseline``."""
    if baseline is None or row.result is baseline:
        return row
    k = max(row.result.seeds[0].ks)
    avg, passed = (compare(row.result, baseline, measure) for measure in (avg_at_k, partial(pass_at_k, k=k)))
    return replace(row, avg=avg, passed=passed)


def _beyond_untrained(result: Result, results: Results) -> Comparison | None:
    """Of pass@k. A run that learns less keeps more of what the untrained model could do: this tells the two apart."""
    if results.untrained is None or result.run.has_own_model:
        return None
    untrained = results.as_untrained(max(seed.number for seed in result.seeds) + 1)
    return compare(result, untrained, partial(pass_at_k, k=max(result.seeds[0].ks)))


def is_same(a: Result, b: Result) -> bool:
    """Whether two runs have the same entropies in training and the same answers after it, in every seed, to the bit."""
    if [seed.number for seed in a.seeds] != [seed.number for seed in b.seeds]:
        return False
    pairs = zip(a.seeds, b.seeds, strict=True)
    return a.curves(ENTROPY) == b.curves(ENTROPY) and all(np.array_equal(x.c, y.c) for x, y in pairs)


def compared_with(plan: LabPlan, results: Results, run: LabRun) -> Result | None:
    """The baseline of a run's regime: of a tuned run the tuned one, if another trial than its own values was chosen."""
    choice = None if plan.tuning is None else plan.tuning.chosen.get(plan.baseline)
    is_tuned = run.setting == "tuned" and run.base != plan.baseline and choice is not None and choice.trial > 0
    name = tuned_name(plan.baseline) if is_tuned else plan.baseline
    return results.runs.get(in_regime(name, run.regime))


def is_member(run: LabRun, regime: str) -> bool:
    """Whether a run is of the regime's table: no trial, and no run of a section of its own."""
    return run.regime == regime and run.setting != "trial" and run.regimes is None


def null_controls(plan: LabPlan) -> set[str]:
    """The entries that are the baseline's with other seeds."""
    by_name = {run.name: run for run in plan.runs}
    pairs = [(run, by_name.get(plan.baseline_in(run.regime))) for run in plan.runs if not run.setting]
    return {
        run.base
        for run, own in pairs
        if own is not None and (run.recipe, run.set) == (own.recipe, own.set) and run.first_seed != own.first_seed
    }


def is_tuned_alike(plan: LabPlan, run: LabRun) -> bool:
    """Whether its own values were the best of a run's trials."""
    choice = None if plan.tuning is None else plan.tuning.chosen.get(run.base)
    return run.setting != "tuned" and choice is not None and not choice.trial


def setting_of(plan: LabPlan, run: LabRun) -> str:
    """In words: "paper's", or what was chosen."""
    if run.setting == "tuned":
        return f"tuned: {run.note}".replace("method.", "")
    return "paper's, tuned alike" if is_tuned_alike(plan, run) else "paper's"


def compare(run: Result, baseline: Result, measure: Callable[[Result, Result], Effect]) -> Comparison | None:
    """By the seeds that both have; None without any, or where they answered other problems."""
    common = {seed.number for seed in run.seeds} & {seed.number for seed in baseline.seeds}
    if not common:
        return None
    try:
        effect = measure(run.only(common), baseline.only(common))
    except ValueError:
        return None
    return Comparison(effect, WORDS[verdict_of(effect, 0.0)], p_value(effect, 0.0))


# --- the sharpening tax ---


def scalability(seed: Seed) -> float | None:
    """S(K) of "Sharpening Tax in Post-Training" (arXiv 2610.01509), K the responses to a problem: how much of what one
    try leaves unsolved further tries solve, on average over their number.

        S(K) = sum_{k < K} (pass@K - pass@k) / ((K - 1) (1 - pass@1)),  pass@k means over problems

    None where every response is right.
    """
    num = int(min(seed.n))
    passed = [
        statistics.fmean(_estimate(int(n), int(c), k) for n, c in zip(seed.n, seed.c, strict=True))
        for k in range(1, num + 1)
    ]
    if num < 2 or passed[0] == 1:
        return None
    return math.fsum(passed[-1] - value for value in passed[:-1]) / ((num - 1) * (1 - passed[0]))


def sharpening_tax(result: Result, untrained: Seed | None) -> list[float]:
    """S(K) of the untrained model less that of the trained one, per seed; above 0 training has made further tries worth
    less. Nothing for a run that began with another model, and for seeds that answer next to nothing: their tax would be
    the untrained model's whole S(K)."""
    before = None if untrained is None or result.run.has_own_model else scalability(untrained)
    if before is None:
        return []
    answering = [seed for seed in result.seeds if float((seed.c / seed.n).mean()) >= ANSWERS]
    return [before - after for after in map(scalability, answering) if after is not None]


_estimate = cache(estimate)


# --- in words ---


def table(plan: LabPlan, results: Results, regime: str, rows: Sequence[Row]) -> list[list[str]]:
    """Header and a line for each row, of which there is one at least."""
    avg, best = avg_metric(rows[0].result), pass_metric(rows[0].result)
    baseline = results.runs.get(plan.baseline_in(regime))
    head = [
        *("method", "setting", "seeds"),
        *(f"{avg}, %", f"less {plan.baseline}'s", f"{best}, %", f"less {plan.baseline}'s", "less untrained's"),
        *("right, %", "entropy", "off target, %", f"{plan.baseline} off it, %", "overshoot, %", "settles at step"),
        *("length", "tax", "time"),
    ]
    lines = [head]
    for row in rows:
        result = row.result
        lines.append(
            [
                (f"{plan.baseline} (null control)" if row.is_null else result.run.base)
                + (f" (= {row.same_as})" if row.same_as else ""),
                row.setting,
                str(len(result.seeds)),
                cell(result.evaluated(avg), ".1f", scale=100),
                said(row.avg),
                cell(result.evaluated(best), ".1f", scale=100),
                said(row.passed),
                said(row.beyond_untrained),
                cell(result.late(RIGHT), ".1f", scale=100),
                cell(result.late(ENTROPY), ".3f"),
                *following(result, baseline),
                cell(result.late(LENGTH), ".1f"),
                cell(sharpening_tax(result, results.untrained), "+.3f"),
                pace(result, baseline),
            ]
        )
    if results.untrained is not None and not rows[0].result.run.has_own_model:
        untrained = results.untrained
        alone = {f"{metric}, %": cell([untrained.metrics[metric]], ".1f", scale=100) for metric in (avg, best)}
        lines.append([({"method": "the untrained model"} | alone).get(column, "-") for column in head])
    return lines


def following(result: Result, baseline: Result | None) -> list[str]:
    """Tracking error, that of the baseline on the same target, overshoot and settling step; of the seeds that have one,
    with their number where not all do."""
    errors = [value for value in of_seeds(tracking_error, result) if value is not None]
    excess = [value for value in of_seeds(overshoot, result) if value is not None]
    steps = [float(value) for value in of_seeds(settling_step, result) if value is not None]
    return [
        cell(errors, ".1f", scale=100),
        cell(uncontrolled_error(result, baseline), ".1f", scale=100),
        _of(cell(excess, ".1f", scale=100), len(excess), result),
        _of(cell(steps, ".0f"), len(steps), result),
    ]


def _of(text: str, found: int, result: Result) -> str:
    return text if found in (0, len(result.seeds)) else f"{text} ({found} of {len(result.seeds)} seeds)"


def said(comparison: Comparison | None) -> str:
    """The verdict with the difference and its interval, in points; a star where it holds for all together."""
    if comparison is None:
        return "-"
    effect = comparison.effect
    if len(effect.seeds) == 1:
        return f"{comparison.verdict}, one seed: {100 * effect.mean:+.1f}"
    low, high = effect.interval
    star = " *" if comparison.survives else ""
    return f"{comparison.verdict}{star} {100 * effect.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def note(plan: LabPlan, found: dict[str, list[Row]]) -> str:
    """How the comparisons are to be read, and how many chance alone would make."""
    made = [
        (row, each)
        for rows in found.values()
        for row in rows
        for each in (row.avg, row.passed)
        if each is not None and len(each.effect.seeds) > 1
    ]
    tested = [each for row, each in made if not row.is_null and not row.same_as]
    null = [each for row, each in made if row.is_null]
    higher, lower = (sum(each.verdict == word for each in tested) for word in (HIGHER, LOWER))
    wrong = sum(each.verdict != NOT_DECIDED for each in null)
    return (
        f"Higher or lower: the whole 95 % interval of the difference from {plan.baseline} of the same regime (of tuned "
        f"rows: from the tuned {plan.baseline}), over seeds and problems, lies on that side of 0. Not decided is no "
        f"evidence that there is no difference: {plan.seeds} seeds leave intervals of several points. {len(tested)} "
        f"comparisons have an interval: {higher} are higher, {lower} are lower. Each interval stands for itself: were "
        f"every method equal to {plan.baseline}, chance alone would make at most about {0.025 * len(tested):.1f} of "
        "them higher and as many lower (the intervals err to the wide side), together rather than each for itself, as "
        f"all share {plan.baseline}'s seeds; and the best of many rows would look good. A star marks what remains "
        "where, of all that have one on this page, 5 % at most are chance on average (Benjamini and Hochberg). A run "
        "that is an earlier one's to the bit (=) counts once. A method here is its whole recipe, its paper's "
        f"aggregation and clip range with it: a difference from {plan.baseline} need not be its entropy term's. Of the "
        f"null control, {plan.baseline} with other seeds, {len(null) - wrong} of {len(null)} comparisons are not "
        "decided, as they should be."
    )


def avg_metric(result: Result) -> str:
    return next(name for name in result.metrics if name.startswith("avg@"))


def pass_metric(result: Result) -> str:
    return f"pass@{max(result.seeds[0].ks)}"

"""What the papers say about entropy, and whether it shows in the lab: decided by a rule from the runs, never by hand.

The plan's list (``recipes/lab/claims.toml``) has the claims with their rules (rules.py), margins and runs. With the
effect's 95 % interval over seeds (intervals.py), a claim

    shows                when the whole interval lies beyond the margin on the claimed side,
    shows the opposite   when it lies beyond the margin on the other side,
    is not decided       otherwise, and always with one seed.

A claim that something is held, ``within`` a margin, shows when the interval lies inside of it and shows the opposite
when it lies outside. Every rule that compares two runs is also asked of the null control, two runs of one method.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import find

from ..tiny.tabular import Curve
from .intervals import CONFIDENCE, Effect, holm
from .results import Result, Results
from .rules import RULES, Criterion
from .store import UNTRAINED

SHOWS, OPPOSITE, NOT_DECIDED, NOT_RUN = "shows", "shows the opposite", "not decided", "not run"
TABLE_RULE = "table_error"
NULL = "null control"
FORMATS = {
    "nats": ("{:+.3f}", "nats", 1),
    "points": ("{:+.1f}", "points", 100),
    "percent": ("{:+.1f}", "%", 100),
    "ratio": ("{:+.4f}", "of the ratio", 1),
    "small nats": ("{:+.5f}", "nats", 1),
}


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict. ``rule`` in words with its margin, ``effect`` with interval, ``p`` of the verdict."""

    paper: str
    text: str
    rule: str
    verdict: str = NOT_RUN
    effect: str = ""
    measured: str = ""
    num_seeds: int = 0
    published: str = ""
    p: float | None = None  # that the effect is no larger than the margin; None without an interval
    within: bool = False  # that something is held, not that it is larger
    survives: bool = False  # Holm's correction for all claims together


def claims(results: Results, table: Mapping[str, Curve], path: Path) -> list[Claim]:
    """Every claim of the list, in its order, then the null control. Raises ConfigError for a faulty list."""
    path, content = read_claims(path)
    decided = [_decided(entry, results, table, path) for entry in content["claim"]]
    control = [_decided(entry, results, table, path) for entry in null_entries(content["claim"], content["null"])]
    return _corrected(decided) + control


def read_claims(path: Path) -> tuple[Path, dict[str, Any]]:
    """The list where it is, and what it holds. Raises ConfigError for a file that is no list of claims."""
    file = find(path)
    try:
        content = tomllib.loads(file.read_text())
        if missing := [name for name in ("null", "claim") if not isinstance(content.get(name), list)]:
            raise ValueError(f"it has no {' and no '.join(missing)}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"claims: {path}: {error}; expected null = [two runs], and [[claim]] of each") from None
    return file, content


def null_entries(entries: Iterable[Mapping[str, Any]], runs: Sequence[str]) -> list[dict[str, Any]]:
    """Each rule that compares two runs, with its margin and options, of the null control instead."""
    found = []
    for entry in entries:
        if entry["rule"] in RULES and RULES[entry["rule"]].null:
            own = {key: value for key, value in entry.items() if key not in ("paper", "text", "published", "runs")}
            text = f"{runs[0]} and {runs[1]} differ by chance only"
            found.append({"paper": NULL, "text": text, **own, "runs": list(runs)})
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def verdict_of(effect: Effect, margin: float, *, within: bool = False) -> str:
    """``effect`` as the claim has it: positive, or with ``within`` small."""
    low, high = effect.interval
    if within:
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
        return SHOWS if inside else OPPOSITE if outside else NOT_DECIDED
    return SHOWS if low > margin else OPPOSITE if high < -margin else NOT_DECIDED


def p_value(effect: Effect, margin: float, *, within: bool = False) -> float:
    """Of the hypothesis that no verdict but "not decided" is due, two-sided; below .05 just where there is one."""
    mirrored = replace(effect, mean=-effect.mean)
    if not within:
        return min(effect.p_above(margin), mirrored.p_above(margin))
    inside = max(effect.p_above(-margin), mirrored.p_above(-margin))
    return min(inside, effect.p_above(margin), mirrored.p_above(margin))


def _decided(entry: Mapping[str, Any], results: Results, table: Mapping[str, Curve], path: Path) -> Claim:
    options = dict(entry)
    try:
        claim = Claim(options.pop("paper"), options.pop("text"), "", published=options.pop("published", ""))
        name = options.pop("rule")
        if name == TABLE_RULE:
            return table_error(claim, table, **options)
        runs, margin, rule = options.pop("runs"), options.pop("margin"), RULES[name]
        if len(runs) != rule.num_runs:
            raise TypeError(f"rule {name} takes {rule.num_runs} runs, found {runs}")
        limit = f"{margin:.0%}" if rule.within else f"by more than {margin_text(rule, margin)}"
        said = rule.said.format(*runs, margin=limit, **options)
        claim = replace(claim, rule=said if rule.within else f"{said}, {limit}")
        return _measured(claim, rule, runs, margin, options, results)
    except (KeyError, TypeError) as error:
        known = ", ".join([*RULES, TABLE_RULE])
        raise ConfigError(
            f"{path}: claim {entry.get('text')!r}: {error}; expected paper, text, a rule of {known}, its runs and "
            "margin (or settings of the exact table) and the rule's options"
        ) from None


def _measured(
    claim: Claim, rule: Criterion, names: Sequence[str], margin: float, options: Mapping[str, Any], results: Results
) -> Claim:
    if missing := [name for name in names if name not in results and not (rule.untrained and name == UNTRAINED)]:
        return replace(claim, measured=f"needs {', '.join(missing)}")
    found = aligned(results, names)
    if found is None:
        return replace(claim, measured=f"no seed of {' and '.join(names)} together")
    try:
        effect, shown = rule.measure(*found, **options), rule.shown(*found, **options)
    except statistics.StatisticsError:  # a mean of nothing
        return replace(claim, measured="too few steps")
    except ValueError as error:
        return replace(claim, measured=str(error))
    own_model = any(run.run.has_own_model for run in found)
    if rule.untrained and UNTRAINED not in names and results.untrained is not None and not own_model:
        metric = f"pass@{options['k']}" if "k" in options else next(iter(results.untrained.metrics))
        shown += f"; untrained {results.untrained.metrics[metric]:.1%}"
    return replace(
        claim,
        within=rule.within,
        verdict=verdict_of(effect, margin, within=rule.within),
        effect=effect_text(rule, effect),
        measured=shown,
        num_seeds=len(effect.seeds),
        p=p_value(effect, margin, within=rule.within),
    )


def aligned(results: Results, names: Sequence[str]) -> list[Result] | None:
    """The runs' results with the seeds that all have; the untrained model's one evaluation stands for every seed."""
    trained = [results[name] for name in names if name != UNTRAINED]
    common = set.intersection(*({seed.number for seed in run.seeds} for run in trained))
    if not common or (UNTRAINED in names and results.untrained is None):
        return None
    found = iter([run.only(common) for run in trained])
    return [results.as_untrained(len(common)) if name == UNTRAINED else next(found) for name in names]


def _corrected(decided: Sequence[Claim]) -> list[Claim]:
    """With Holm's correction over all claims that have an interval."""
    tested = [i for i, claim in enumerate(decided) if claim.p is not None]
    adjusted = dict(zip(tested, holm([decided[i].p or 0.0 for i in tested]), strict=True))
    return [replace(claim, survives=adjusted.get(i, 1.0) < 1 - CONFIDENCE) for i, claim in enumerate(decided)]


def effect_text(rule: Criterion, effect: Effect) -> str:
    style, unit, scale = FORMATS[rule.unit]
    low, high = (style.format(scale * value) for value in effect.interval)
    interval = ", one seed" if len(effect.seeds) == 1 else f" [{low}, {high}]"
    return f"{style.format(scale * effect.mean)} {unit}{interval}"


def margin_text(rule: Criterion, margin: float) -> str:
    _, unit, scale = FORMATS[rule.unit]
    size = f"{scale * margin:g}"
    return f"{size} {unit.removesuffix('s')}" if size == "1" else f"{size} {unit}"


def table_error(
    claim: Claim,
    table: Mapping[str, Curve],
    *,
    settings: Sequence[str],
    below: float | None = None,
    above: float | None = None,
) -> Claim:
    """The relative error at the end, ``below`` or ``above`` a limit in every setting. Exact: nothing is sampled."""
    errors = [table[name].error / table[name].setting.target for name in settings]
    if below is not None:
        said, holds = f"error at the end below {below:.0%}", all(abs(error) < below for error in errors)
    else:
        assert above is not None
        said, holds = f"error at the end above {above:.0%}", all(abs(error) > above for error in errors)
    starts = ", both starts" if len(settings) == 2 else ""
    measured = ", ".join(f"{error:+.1%}" for error in errors)
    return replace(claim, rule=said + starts, verdict=SHOWS if holds else OPPOSITE, effect="exact", measured=measured)

"""What the papers say about entropy, and whether it shows in the lab: decided by a rule from the runs, never by hand.

``recipes/lab/claims.toml`` lists the claims; RULES has what decides them, by the names used there. A rule is asked once
per seed (runs of one seed see the same problems in the same order) and a claim *shows* when it holds in every seed,
shows *in some* when in one at least, and otherwise *does not show*. "Late" means the last third of the steps. Entropy
is the mean of a step's response tokens over the whole vocabulary, in nats.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import find

from ..tiny.tabular import Curve
from .results import Result, Results

CLAIMS = Path("recipes/lab/claims.toml")
ENTROPY = "entropy/full"


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict. ``holds`` is per seed; empty when its runs are not finished."""

    paper: str
    text: str
    rule: str
    measured: str
    holds: tuple[bool, ...]

    @property
    def verdict(self) -> str:
        if not self.holds:
            return "not run"
        count = f" ({sum(self.holds)}/{len(self.holds)} seeds)" if len(self.holds) > 1 else ""
        return ("shows" if all(self.holds) else "in some" if any(self.holds) else "does not show") + count


@dataclass(frozen=True)
class Criterion:
    """In words, per seed, and what was measured; the functions take one Result for each of the claim's runs."""

    said: str
    holds: Callable[..., list[bool]]
    measured: Callable[..., str]


def claims(results: Results, table: Mapping[str, Curve]) -> list[Claim]:
    """Every claim of the list, in its order. Raises ConfigError for a faulty list."""
    path = find(CLAIMS)
    return [_decided(entry, results, table, path) for entry in tomllib.loads(path.read_text())["claim"]]


def _decided(entry: Mapping[str, Any], results: Results, table: Mapping[str, Curve], path: Path) -> Claim:
    parameters = dict(entry)
    try:
        paper, text, rule = (parameters.pop(key) for key in ("paper", "text", "rule"))
        if rule == TABLE_RULE:
            return table_error(paper, text, table, **parameters)
        runs = parameters.pop("runs")
        test = RULES[rule](runs, **parameters)
    except (KeyError, TypeError) as error:
        known = ", ".join([*RULES, TABLE_RULE])
        raise ConfigError(
            f"{path}: claim {entry.get('text')!r}: {error}; expected paper, text, a rule of {known}, its runs "
            "(or settings of the exact table) and the rule's parameters"
        ) from None
    if missing := [name for name in runs if name not in results]:
        return Claim(paper, text, test.said, f"needs {', '.join(missing)}", ())
    common = set.intersection(*({seed.number for seed in results[name].seeds} for name in runs))
    if not common:
        return Claim(paper, text, test.said, f"no seed of {' and '.join(runs)} together", ())
    found = [results[name].only(common) for name in runs]
    return Claim(paper, text, test.said, test.measured(*found), tuple(test.holds(*found)))


# --- one run ---


def collapses(runs: Sequence[str], *, at_most: float) -> Criterion:
    """Late entropy as a share of the first step's."""

    def shares(run: Result) -> list[float]:
        return [late / first for late, first in zip(run.late(ENTROPY), run.first(ENTROPY), strict=True)]

    return Criterion(
        f"late entropy at most {at_most:.0%} of the first step's",
        lambda run: [value <= at_most for value in shares(run)],
        lambda run: f"late / first {_spread(shares(run))}",
    )


def explodes(runs: Sequence[str], *, alarm: str) -> Criterion:
    """Late entropy above the first step's, with an alarm that lasts."""

    def lasting(run: Result) -> list[float]:
        return run.late(f"alarm/{alarm}") or [0.0] * len(run.seeds)

    return Criterion(
        f"late entropy above the first step's, alarm {alarm} lasting at the end",
        lambda run: [
            late > first and on > 0.99
            for late, first, on in zip(run.late(ENTROPY), run.first(ENTROPY), lasting(run), strict=True)
        ],
        lambda run: f"late entropy {_spread(run.late(ENTROPY))}, late reward {_spread(run.late('reward/mean'))}",
    )


def holds_target(runs: Sequence[str], *, within: float) -> Criterion:
    """What the method's controller measures, against its target."""

    def measured(run: Result) -> str:
        distance = f"distance {_percent(run.distance)}"
        if not run.saturated:
            return distance
        return f"{distance}, output at its bound in {statistics.fmean(run.saturated):.0%} of late steps"

    return Criterion(
        f"late mean of what it controls within {within:.0%} of the target",
        lambda run: [abs(value) <= within for value in run.distance],
        measured,
    )


def second_stage_above(runs: Sequence[str]) -> Criterion:
    """A curriculum of two stages: uncertain problems come last."""

    def stages(run: Result) -> list[tuple[float, float]]:
        pairs = []
        for entropy, stage in zip(run.curves(ENTROPY), run.curves("data/stage"), strict=True):
            first = [e for e, s in zip(entropy, stage, strict=True) if s == 0 and e is not None]
            second = [e for e, s in zip(entropy, stage, strict=True) if s == 1 and e is not None]
            pairs.append((statistics.fmean(first[len(first) * 2 // 3 :]), statistics.fmean(second or [0.0])))
        return pairs

    return Criterion(
        "mean entropy of the second stage above that of the first stage's last third",
        lambda run: [second > first for first, second in stages(run)],
        lambda run: f"{_spread([b for _, b in stages(run)])} after {_spread([a for a, _ in stages(run)])}",
    )


# --- one run beside another, seed by seed ---


def first_holds_target(runs: Sequence[str], *, labels: Sequence[str], within: float) -> Criterion:
    return Criterion(
        f"{labels[0]}: late entropy within {within:.0%} of the target",
        lambda first, _: [abs(value) <= within for value in first.distance],
        lambda first, second: _distances(labels, first, second),
    )


def only_second_holds_target(runs: Sequence[str], *, labels: Sequence[str], within: float) -> Criterion:
    return Criterion(
        f"{labels[0]} further than {within:.0%}, {labels[1]} within",
        lambda first, second: [abs(a) > within >= abs(b) for a, b in zip(first.distance, second.distance, strict=True)],
        lambda first, second: _distances(labels, first, second),
    )


def _distances(labels: Sequence[str], *results: Result) -> str:
    return ", ".join(f"{label} {_percent(run.distance)}" for label, run in zip(labels, results, strict=True))


def late_entropy_above(runs: Sequence[str]) -> Criterion:
    return _above(f"late entropy above that of {runs[1]}", lambda run: run.late(ENTROPY))


def avg_at_k_above(runs: Sequence[str]) -> Criterion:
    def held_out(run: Result) -> list[float]:
        return run.evaluated(next(name for name in run.metrics if name.startswith("avg@")))

    return _above(f"held-out avg@k above that of {runs[1]}", held_out)


def _above(said: str, value: Callable[[Result], list[float]]) -> Criterion:
    return Criterion(
        said,
        lambda a, b: [x > y for x, y in zip(value(a), value(b), strict=True)],
        lambda a, b: f"{_spread(value(a))} against {_spread(value(b))}",
    )


def pass_at_k_above(runs: Sequence[str]) -> Criterion:
    def largest(run: Result) -> int:
        return max(run.seeds[0].evaluation["decoding"]["ks"])

    def passed(run: Result) -> list[float]:
        return run.evaluated(f"pass@{largest(run)}")

    return Criterion(
        f"pass@k on the held-out problems, at the largest k, above that of {runs[1]}",
        lambda a, b: [x > y for x, y in zip(passed(a), passed(b), strict=True)],
        lambda a, b: f"pass@{largest(a)} {_percent(passed(a), '.1%')} against {_percent(passed(b), '.1%')}",
    )


RULES: dict[str, Callable[..., Criterion]] = {
    rule.__name__: rule
    for rule in (
        *(collapses, explodes, holds_target, first_holds_target, only_second_holds_target),
        *(late_entropy_above, avg_at_k_above, pass_at_k_above, second_stage_above),
    )
}


# --- the exact table ---

TABLE_RULE = "table_error"


def table_error(
    paper: str,
    text: str,
    table: Mapping[str, Curve],
    *,
    settings: Sequence[str],
    below: float | None = None,
    above: float | None = None,
) -> Claim:
    """The relative error at the end, ``below`` or ``above`` a limit. Each setting is one run: one verdict for all."""
    errors = [table[name].error / table[name].setting.target for name in settings]
    if below is not None:
        said, holds = f"error at the end below {below:.0%}", all(abs(error) < below for error in errors)
    else:
        assert above is not None
        said, holds = f"error at the end above {above:.0%}", all(abs(error) > above for error in errors)
    starts = ", both starts" if len(settings) == 2 else ""
    return Claim(paper, text, said + starts, ", ".join(f"{error:+.1%}" for error in errors), (holds,))


# --- numbers ---


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def _percent(values: Sequence[float], style: str = "+.1%") -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{style}}"
    return f"{statistics.fmean(values):{style}} ± {statistics.stdev(values):.1%}"

"""Which problems one of two models solves and the other does not."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.metrics.eval_stats import paired_bootstrap

from . import figures
from .counts import Solved, counted, paired
from .figures import BAD, GOOD, SOFT, Result

RULES = ("majority", "half", "any")
LISTED = 8  # problems of each side on the terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--solved",
        choices=RULES,
        help="solved if the majority answer, more than half of the responses, or any response is right (majority where "
        "it is known, else half)",
    )


def analyze(options: argparse.Namespace, console: Console) -> Result:
    counts = counted(options)
    if len(counts) != 2:
        raise ConfigError(
            f"flips: found {len(counts)} models ({', '.join(each.label for each in counts)}), expected two: two "
            "samples files, two evaluations, or one with two labels"
        )
    first, second = counts
    pairs = paired(first, second)
    known = all(row.majority is not None for pair in pairs for row in pair)
    rule = options.solved or ("majority" if known else "half")
    if rule == "majority" and not known:
        raise ConfigError("--solved majority: samples files hold no votes; give evaluations (.json) or --solved half")
    sides = Counter((_solved(a, rule), _solved(b, rule)) for a, b in pairs)
    gained, lost = sides[False, True], sides[True, False]
    difference = paired_bootstrap([a.accuracy for a, _ in pairs], [b.accuracy for _, b in pairs])
    p_value = mcnemar(gained, lost)
    title = options.title or f"{second.label} solves {gained} problems that {first.label} does not, and loses {lost}"
    figure, (axes,) = figures.panels(
        1, title, subtitle=_subtitle(rule, p_value, difference.interval), width=5.6, height=5.6
    )
    _draw(axes, pairs, rule, first.label, second.label)
    flipped = {
        "gained": _listing(
            [pair for pair in pairs if (_solved(pair[0], rule), _solved(pair[1], rule)) == (False, True)]
        ),
        "lost": _listing([pair for pair in pairs if (_solved(pair[0], rule), _solved(pair[1], rule)) == (True, False)]),
    }
    content = {
        "models": {each.label: each.described() for each in counts},
        "solved_if": rule,
        "problems": len(pairs),
        "not_paired": len(first.rows) + len(second.rows) - 2 * len(pairs),
        "solved_by": {
            "both": sides[True, True], "first_only": lost, "second_only": gained, "neither": sides[False, False],
        },
        "mcnemar_p": p_value,
        "accuracy_difference": vars(difference.interval) | {"p": difference.p_value},
        **flipped,
    }  # fmt: skip
    both, neither = sides[True, True], sides[False, False]
    lines = [f"both {both}, only {first.label} {lost}, only {second.label} {gained}, neither {neither}"]
    if content["not_paired"]:
        lines.append(f"{content['not_paired']} problems that only one of them has are left out")
    for name, rows in flipped.items():
        lines += [f"{name}: {row['set']}/{row['id']} {row['before']} -> {row['after']}" for row in rows[:LISTED]]
    meaning = (
        f"Each circle is problems at the same pair of shares of right responses. {_rule(rule)} McNemar: the exact "
        "two-sided probability of so uneven a split of the flipped problems if either side were as likely."
    )
    return Result(title, figure, content, meaning, lines)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value: ``gained + lost`` coins, at least as uneven (McNemar 1947)."""
    total, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def _solved(row: Solved, rule: str) -> bool:
    if rule == "majority":
        return bool(row.majority)
    return row.c > 0 if rule == "any" else 2 * row.c > row.n


def _rule(rule: str) -> str:
    what = {"majority": "the majority answer is right", "half": "more than half of its responses are right"}
    return f"A problem counts as solved if {what.get(rule, 'any of its responses is right')}."


def _subtitle(rule: str, p_value: float, interval: Any) -> str:
    change = f"accuracy {100 * interval.mean:+.1f} points ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
    return f"{_rule(rule)} McNemar p = {p_value:.2g}; {change}"


def _listing(pairs: Sequence[tuple[Solved, Solved]]) -> list[dict[str, Any]]:
    """The largest changes first."""
    ordered = sorted(pairs, key=lambda pair: (-abs(pair[1].accuracy - pair[0].accuracy), pair[0].key))
    return [
        {
            "set": a.set, "id": a.id, "before": f"{a.c}/{a.n}", "after": f"{b.c}/{b.n}",
            "level": b.level or a.level, "kind": b.kind or a.kind,
            "prompt": b.prompt or a.prompt, "answer": b.answer or a.answer,
        }
        for a, b in ordered
    ]  # fmt: skip


def _draw(axes: Axes, pairs: Sequence[tuple[Solved, Solved]], rule: str, first: str, second: str) -> None:
    points = Counter((a.accuracy, b.accuracy, _solved(a, rule), _solved(b, rule)) for a, b in pairs)
    most = max(points.values())
    names = {
        (False, True): "gained",
        (True, False): "lost",
        (True, True): "solved by both",
        (False, False): "by neither",
    }
    colors = {(False, True): GOOD, (True, False): BAD, (True, True): "#9db4c8", (False, False): "#c9c9c9"}
    for (x, y, *side), count in points.most_common():  # the largest circles lie below
        color = colors[side[0], side[1]]
        axes.scatter(x, y, s=18 + 420 * count / most, color=color, linewidths=0.8, edgecolors="white", zorder=3)
    for side, name in names.items():
        total = sum(count for (_, _, *key), count in points.items() if tuple(key) == side)
        axes.scatter([], [], s=45, color=colors[side], label=f"{name}: {total}")
    axes.plot([0, 1], [0, 1], color=SOFT, lw=0.8, ls=(0, (4, 4)), zorder=1)
    axes.grid(True, axis="both")
    axes.set(
        xlim=(-0.07, 1.07), ylim=(-0.07, 1.07), xlabel=f"right responses, {first}", ylabel=f"right responses, {second}"
    )
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.25, 0.5, 0.75, 1])
        figures.percent_axis(axis)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, handletextpad=0.1, columnspacing=1.2)

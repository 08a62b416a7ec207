"""Accuracy by level or kind of problem, of several models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.metrics.eval_stats import Interval, bootstrap

from . import figures
from .counts import Counts, Solved, counted
from .figures import Result

MEANING = (
    "Mean share of right responses to the problems of a group; whiskers are 95 % bootstrap intervals over problems."
)
GROUPS = ("level", "kind", "set")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=GROUPS, help="what groups problems (level where problems have one, else kind)")


def analyze(options: argparse.Namespace, console: Console) -> Result:
    counts = counted(options)
    by = options.by or next((each for each in GROUPS if _names(counts, each)), "set")
    names = _names(counts, by)
    if not names:
        raise ConfigError(
            f"--by {by}: no problem has a {by}; give the problem files that have it with --data, or choose another --by"
        )
    numbers = {each.label: {name: _accuracy(each.rows, by, name) for name in names} for each in counts}
    title = options.title or f"Accuracy by {by}"
    figure, (axes,) = figures.panels(1, title, width=max(figures.WIDTH, 0.9 * len(names) + 2))
    spread = min(0.6, 0.16 * (len(counts) - 1))
    for number, (label, groups) in enumerate(numbers.items()):
        shift = spread * (number / max(1, len(counts) - 1) - 0.5) if len(counts) > 1 else 0.0
        known = [(place + shift, groups[name]) for place, name in enumerate(names) if groups[name] is not None]
        means = np.array([value[0].mean for _, value in known if value])
        ends = np.array(
            [(value[0].mean - value[0].low, value[0].high - value[0].mean) for _, value in known if value]
        ).T
        axes.errorbar(
            [place for place, _ in known], means, yerr=np.clip(ends, 0, None), fmt="o", color=figures.color(number),
            markersize=6, capsize=0, elinewidth=2.2, label=label,
        )  # fmt: skip
    sizes = [max(sum(getattr(row, by) == name for row in each.rows) for each in counts) for name in names]
    axes.set_xticks(range(len(names)), [f"{name}\n{size} problems" for name, size in zip(names, sizes, strict=True)])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set(xlabel=by, ylabel="right responses")
    figures.percent_axis(axes.yaxis)
    if len(counts) > 1:
        figures.legend_below(axes)
    content = {
        "by": by,
        "models": {each.label: each.described() for each in counts},
        "accuracy": {
            label: {name: {"problems": value[1], **vars(value[0])} if value else None for name, value in groups.items()}
            for label, groups in numbers.items()
        },
    }
    lines = [
        f"{label}: " + ", ".join(f"{name} {100 * value[0].mean:.1f} %" for name, value in groups.items() if value)
        for label, groups in numbers.items()
    ]
    return Result(title, figure, content, MEANING, lines)


def _names(counts: Sequence[Counts], by: str) -> list[str]:
    """The groups of all models; numbers in their order."""
    found = {getattr(row, by) for each in counts for row in each.rows} - {""}
    return sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def _accuracy(rows: Sequence[Solved], by: str, name: str) -> tuple[Interval, int] | None:
    values = [row.accuracy for row in rows if getattr(row, by) == name]
    if not values:
        return None
    (interval,) = bootstrap(np.array(values)[:, None])
    return interval, len(values)

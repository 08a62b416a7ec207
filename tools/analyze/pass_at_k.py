"""pass@k of several models: SIREN Figure 5, AER Figure 3 a and d, Entropy Advantage Figure 5, SENT Figure 3."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console

from megatron_ext.metrics.eval_stats import Interval, bootstrap, pass_at_k

from . import figures
from .counts import Solved, counted, sets_of
from .figures import Result

MEANING = (
    "pass@k: the probability that at least one of k responses is right, estimated without bias from n responses "
    "(Chen et al., arXiv 2107.03374). Bands are 95 % bootstrap intervals over problems."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def analyze(options: argparse.Namespace, console: Console) -> Result:
    counts = counted(options)
    sets = sets_of(counts)
    numbers = {name: {each.label: _curve(each.of_set(name)) for each in counts if each.of_set(name)} for name in sets}
    several = len(counts) > 1
    title = options.title or (f"pass@k of {len(counts)} models" if several else f"pass@k of {counts[0].label}")
    figure, axes = figures.panels(len(sets), title)
    for name, panel in zip(sets, axes, strict=True):
        problems = len({row.id for each in counts for row in each.of_set(name)})
        colors = {each.label: figures.color(number) for number, each in enumerate(counts)}
        draw(panel, numbers[name], f"{name} ({problems} problems)", colors)
    if several:
        figures.legend_below(axes[0])
    lines = [
        f"{name}, {label}: " + ", ".join(f"pass@{k} {100 * each.mean:.1f} %" for k, each in curve.items())
        for name, curves in numbers.items()
        for label, curve in curves.items()
    ]
    content = {
        "models": {each.label: each.described() for each in counts},
        "pass_at_k": {
            name: {label: {k: vars(each) for k, each in curve.items()} for label, curve in curves.items()}
            for name, curves in numbers.items()
        },
    }
    return Result(title, figure, content, MEANING, lines)


def _curve(rows: Sequence[Solved]) -> dict[int, Interval]:
    """``k -> pass@k`` at the powers of two up to the fewest responses of a problem, and there."""
    most = min(row.n for row in rows)
    ks = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
    values = np.array([[pass_at_k(row.n, row.c, k) for k in ks] for row in rows])
    return dict(zip(ks, bootstrap(values), strict=True))


def draw(
    axes: Axes, curves: Mapping[str, Mapping[int, Interval]], title: str, colors: Mapping[str, str] | None = None
) -> None:
    """Curves ``label -> k -> pass@k`` with their intervals as bands."""
    for number, (label, curve) in enumerate(curves.items()):
        color = colors[label] if colors else figures.color(number)
        ks, values = list(curve), list(curve.values())
        low, high = [value.low for value in values], [value.high for value in values]
        axes.fill_between(ks, low, high, color=color, alpha=0.13, lw=0)
        axes.plot(ks, [value.mean for value in values], color=color, marker="o", markersize=4, label=label)
    figures.powers_axis(axes, sorted({k for curve in curves.values() for k in curve}))
    figures.percent_axis(axes.yaxis)
    axes.set(xlabel="k: responses (log scale)", ylabel="pass@k", title=title)

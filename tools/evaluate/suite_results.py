"""What several models did on the sets of a suite: columns, averages, paired differences, pass@k; and a figure of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ext.metrics.eval_stats import (
    CONFIDENCE,
    Difference,
    Interval,
    average,
    average_difference,
    paired_bootstrap,
    per_problem,
)

from .suite import Suite

Evaluations = Mapping[str, Mapping[str, dict[str, Any]]]  # model -> set -> evaluation


def suite_results(suite: Suite, found: Evaluations) -> dict[str, Any]:
    """The suite's result as plain JSON. The first model is the one that others are compared with."""
    first, *others = found
    values = {label: [_values(sets[each.name]) for each in suite.sets] for label, sets in found.items()}
    return {
        "suite": suite.name,
        "title": suite.title,
        "file": str(suite.path),
        "confidence": CONFIDENCE,
        "columns": [
            {"set": each.name, "title": each.title, "metric": metric} for each in suite.sets for metric in each.metrics
        ],
        "models": {
            label: {"sets": dict(sets), "average": [asdict(average(part)) for part in _columns(suite, values[label])]}
            for label, sets in found.items()
        },
        "differences": {
            label: {
                "to": first,
                "sets": {
                    each.name: {
                        metric: _plain(paired_bootstrap(values[first][i][metric], values[label][i][metric]))
                        for metric in values[first][i]
                    }
                    for i, each in enumerate(suite.sets)
                },
                "average": [
                    _plain(average_difference(a, b))
                    for a, b in zip(_columns(suite, values[first]), _columns(suite, values[label]), strict=True)
                ],
            }
            for label in others
        },
        "pass_at_k": {
            label: {each.name: pass_curve(sets[each.name]) for each in suite.sets} for label, sets in found.items()
        },
    }


def pass_curve(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """``k -> pass@k`` with its interval."""
    return {str(k): evaluation["metrics"][f"pass@{k}"] for k in evaluation["decoding"]["ks"]}


def pass_figure(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each set, a line for each model: pass@k against k, with the intervals as bands."""
    from ..analyze import figures  # matplotlib, only where a figure is drawn
    from ..analyze.pass_at_k import draw

    titles = {column["set"]: column["title"] for column in result["columns"]}
    with figures.styled():
        figure, panels = figures.panels(len(titles), f"pass@k, {result['title']}")
        for panel, (name, title) in zip(panels, titles.items(), strict=True):
            found = {label: sets[name] for label, sets in result["pass_at_k"].items()}
            curves = {label: {int(k): Interval(**at) for k, at in curve.items()} for label, curve in found.items()}
            draw(panel, curves, title)
        if len(result["pass_at_k"]) > 1:
            figures.legend_below(panels[0])
        figure.savefig(path, dpi=figures.DPI)


def _values(evaluation: Mapping[str, Any]) -> dict[str, list[float]]:
    """``metric -> value of each problem``."""
    return per_problem(evaluation["problems"], evaluation["decoding"]["ks"])


def _columns(suite: Suite, values: Sequence[Mapping[str, list[float]]]) -> list[list[list[float]]]:
    """For each average: every set's values of its metric in that place."""
    return [
        [per_set[each.metrics[i]] for each, per_set in zip(suite.sets, values, strict=True)]
        for i in range(suite.columns())
    ]


def _plain(difference: Difference) -> dict[str, float]:
    return {**asdict(difference.interval), "p_value": difference.p_value}

"""Evaluations as tables for the terminal: one model's, and several models' beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import markup
from rich.table import Table

from megatron_ext.metrics.eval_stats import differences


def table(evaluation: dict[str, Any]) -> Table:
    """The metrics with their intervals, for the terminal."""
    decoding = evaluation["decoding"]
    found = Table(
        title=f"{evaluation['num_problems']} problems x {decoding['samples']} responses, "
        f"T {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    )
    for name, justify in (("metric", "left"), ("mean", "right"), ("95 % interval", "right")):
        found.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, value in evaluation["metrics"].items():
        found.add_row(name, f"{value['mean']:.1%}", f"{value['low']:.1%} .. {value['high']:.1%}")
    length, cut = evaluation["response"]["length"], evaluation["response"]["truncated"]
    found.add_section()
    found.add_row("length", f"{length['mean']:.1f}", f"{length['low']:.1f} .. {length['high']:.1f}")
    found.add_row("truncated", f"{cut['mean']:.1%}", f"{cut['low']:.1%} .. {cut['high']:.1%}")
    for name, share in evaluation["outcomes"].items():
        found.add_row(f"outcome {name}", f"{share:.1%}", "")
    return found


def side_by_side(evaluations: Mapping[str, dict[str, Any]]) -> list[Table]:
    """The metrics of several models, and the paired differences to the first; evaluations of the same problems."""
    first, *others = evaluations
    values = Table(title="mean and 95 % interval", title_justify="left")
    values.add_column("metric")
    for label in evaluations:
        values.add_column(markup.escape(label), justify="right", overflow="fold")
    for name in evaluations[first]["metrics"]:
        found = [each["metrics"][name] for each in evaluations.values()]
        values.add_row(name, *(f"{v['mean']:.1%} ({v['low']:.1%} .. {v['high']:.1%})" for v in found))
    pairs = [differences(evaluations[first], evaluations[label]) for label in others]
    changes = Table(title=f"difference to {markup.escape(first)}, points, the same problems", title_justify="left")
    changes.add_column("metric")
    for label in others:
        changes.add_column(markup.escape(label), justify="right", overflow="fold")
    for name in evaluations[first]["metrics"]:
        ends = [[100 * x for x in (d[name].interval.mean, d[name].interval.low, d[name].interval.high)] for d in pairs]
        changes.add_row(name, *(f"{mean:+.1f} ({low:+.1f} .. {high:+.1f})" for mean, low, high in ends))
    return [values, changes]

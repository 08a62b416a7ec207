"""The paper's table with our numbers: each cell the published figure and, where there is an evaluation, ours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.files import LARGE_BYTES, read_json

from .rows import Plan
from .tables import LENGTH, MEAN, PaperTable


@dataclass(frozen=True)
class Cell:
    """Per cent, or tokens in a column of lengths. ``metric``: the evaluation's name of what ours is."""

    published: float | None = None
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    metric: str = ""

    @property
    def interval(self) -> str:
        return "" if self.low is None else f"{self.low:.1f}..{self.high:.1f}"


@dataclass(frozen=True)
class Result:
    """A table with a list of cells for each of its rows."""

    table: PaperTable
    plans: Sequence[Plan]
    rows: Sequence[Sequence[Cell]]
    tiny: bool = False  # ours are of the tiny task: the chain is shown, the figures compare with nothing

    @property
    def heading(self) -> str:
        ours = "ours of the tiny task, not to be compared" if self.tiny else "ours"
        return f"{self.table.name}: {ours}, 95 % interval, published"

    @property
    def other_metrics(self) -> list[str]:
        """What ours are where it is not what the column says."""
        pairs = [pair for row in self.rows for pair in zip(row, self.table.columns, strict=True)]
        return sorted({cell.metric for cell, (_, _, metric) in pairs if cell.metric not in ("", metric)})

    @property
    def note(self) -> str:
        """What to say of numbers of samples that are not the paper's; empty where there are none."""
        others = ", ".join(self.other_metrics)
        return f"Ours are {others} where the paper has other numbers of samples." if others else ""


def cells(table: PaperTable, plan: Plan) -> list[Cell]:
    """A row's cells. Raises ConfigError for an evaluation that cannot be read."""
    evaluated = _evaluated(plan)
    evaluations, averages = evaluated.get("sets", {}), evaluated.get("average", ())
    published = [None if math.isnan(each) else each for each in plan.row.published] or [None] * len(table.columns)
    found: list[Cell] = []
    for (_, name, metric), figure in zip(table.columns, published, strict=True):
        if name == MEAN:
            same = [cell.ours for cell, column in zip(found, table.columns, strict=False) if _kind(column[2]) == metric]
            alone = [_ours(each, metric) for each in evaluations.values()]
            values = same or [each[0] if each else None for each in alone]
            known = [value for value in values if value is not None]
            ours = sum(known) / len(known) if known and len(known) == len(values) else None
            low, high = _interval_of(ours, averages)
            found.append(Cell(figure, ours, low, high, metric if ours is not None else ""))
            continue
        value = _ours(evaluations.get(name), metric)
        found.append(Cell(figure, *value) if value else Cell(figure))
    return found


def as_json(result: Result) -> dict[str, Any]:
    """The whole table, for other programs."""
    table = result.table
    return {
        "table": table.name,
        "title": table.title,
        "tiny": result.tiny,
        "columns": [{"title": title, "set": name, "metric": metric} for title, name, metric in table.columns],
        "rows": [
            {"label": plan.row.label, "group": plan.row.group, "cells": [asdict(cell) for cell in row]}
            for plan, row in zip(result.plans, result.rows, strict=True)
        ],
    }


def as_markdown(result: Result) -> str:
    """Ours with its interval, and the published figure behind a bar."""
    table = result.table
    lines = [f"### {table.name}. {table.title}", "", f"{result.heading}.", ""]
    lines.append("| | " + " | ".join(title for title, _, _ in table.columns) + " |")
    lines.append("|---|" + "---|" * len(table.columns))
    for plan, row in zip(result.plans, result.rows, strict=True):
        name = f"{plan.row.group}: {plan.row.label}" if plan.row.group else plan.row.label
        shown = [
            f"{_number(cell.ours)}{f' ({cell.interval})' if cell.interval else ''} / {_number(cell.published)}"
            for cell in row
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    notes = [note for note in (result.note, table.note) if note]
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), ""])


def draw(result: Result, path: Path) -> None:
    """A panel for each column: published hollow, ours filled with its interval, a line for each row."""
    from matplotlib.figure import Figure

    table, plans, rows = result.table, result.plans, result.rows
    across = min(4, len(table.columns))
    down = -(-len(table.columns) // across)
    figure = Figure(figsize=(3.2 * across + 1.5, (0.28 * len(plans) + 0.9) * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flat
    heights = range(len(plans))
    for number, panel in enumerate(panels):
        if number >= len(table.columns):
            panel.remove()
            continue
        column = [row[number] for row in rows]
        panel.scatter([_nan(cell.published) for cell in column], heights, facecolors="none", edgecolors="#555555")
        panel.scatter([_nan(cell.ours) for cell in column], heights, color="#0072b2", zorder=3)
        for height, cell in zip(heights, column, strict=True):
            if cell.low is not None and cell.high is not None:
                panel.plot([cell.low, cell.high], [height, height], color="#0072b2")
        panel.set_title(table.columns[number][0], fontsize=9)
        panel.grid(alpha=0.3)
        panel.set_yticks(list(heights), [plan.row.label for plan in plans], fontsize=8)
    figure.axes[0].invert_yaxis()
    figure.suptitle("\n".join(filter(None, (f"{result.heading} (hollow)", result.note))), fontsize=10)
    figure.savefig(path, dpi=150)


def _interval_of(mean: float | None, averages: Sequence[Mapping[str, float]]) -> tuple[float | None, float | None]:
    """The interval of a mean over sets, where the evaluation has the average of the same sets and metric."""
    if mean is not None:
        for each in averages:
            if math.isclose(100 * each["mean"], mean, abs_tol=1e-6):
                return 100 * each["low"], 100 * each["high"]
    return None, None


def _evaluated(plan: Plan) -> Mapping[str, Any]:
    """``sets`` and ``average`` of the row's model in the suite's result; empty where there is none yet."""
    if plan.evaluation is None or not plan.evaluation.is_file():
        return {}
    try:
        found = read_json(plan.evaluation, max_bytes=LARGE_BYTES)
        model = list(found["models"].values())[-1]
        return {"sets": model["sets"], "average": model.get("average", ())}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{plan.evaluation} is no result of megatron-entropy evaluate --suite ({type(error).__name__}: {error}); "
            "remove it and evaluate again"
        ) from None


def _ours(evaluation: Any, metric: str) -> tuple[float, float, float, str] | None:
    """Value, interval and name of a metric, in per cent; with other samples, of the nearest of its kind."""
    if evaluation is None:
        return None
    if metric == LENGTH:
        found = evaluation["response"][LENGTH]
        return found["mean"], found["low"], found["high"], LENGTH
    kind = _kind(metric)
    names = sorted((name for name in evaluation["metrics"] if _kind(name) == kind), key=_count)
    smaller = [name for name in names if _count(name) <= _count(metric)] if "@" in metric else names
    if not names:
        return None
    name = smaller[-1] if smaller else names[0]
    found = evaluation["metrics"][name]
    return 100 * found["mean"], 100 * found["low"], 100 * found["high"], name


def _kind(metric: str) -> str:
    return metric.partition("@")[0]


def _count(metric: str) -> int:
    return int(metric.partition("@")[2] or 0)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def write(path: Path, found: Sequence[Result]) -> None:
    """``.md`` or ``.json`` of all tables, ``.png`` of the one that there is. Raises ConfigError."""
    if path.suffix == ".json":
        content = json.dumps([as_json(each) for each in found], indent=1, ensure_ascii=False) + "\n"
    elif path.suffix == ".md":
        content = "\n".join(as_markdown(each) for each in found)
    elif path.suffix == ".png":
        if len(found) != 1:
            raise ConfigError(f"--out {path}: a picture is of one table, found {len(found)}; name one with --table")
        return draw(found[0], path)
    else:
        raise ConfigError(f"--out {path}: expected a name ending in .md, .json or .png")
    path.write_text(content, encoding="utf-8")

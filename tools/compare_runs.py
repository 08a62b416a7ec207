"""Runs side by side: what was configured differently, what came out, and whether it is the same to the bit.

    megatron-entropy compare RUN_A RUN_B [RUN_C ...] [--out compare.html]
    megatron-entropy compare RUN_A RUN_B [RUN_C ...] --bitwise

All are compared with the first. ``--bitwise`` compares every metric of every step except clock readings and names the
first that differs; what only one of two runs validated is left out. Exit codes: 0 done (with ``--bitwise``: all equal),
1 not equal, 2 a folder holds no run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table

from megatron_ext.metrics.eval_stats import Difference, differences
from megatron_ext.metrics.glossary import CLOCK

from .arguments import command_parser, output_file
from .charts import NUM_COLORS, Figures, Series, short
from .evaluate import load_evaluations
from .report.data import EVALUATION, load_metrics, read_config, read_glossary
from .report.page import ends, flatten, page

Records = Sequence[Mapping[str, Any]]
COMPARED = (
    "reward/mean",
    "validation/avg",
    "entropy/full",
    "entropy/nucleus",
    "response/length",
    "response/truncated",
    "grad/norm",
    "kl/old",
    "clip/low",
    "clip/high",
    "mismatch/mean",
    "time/step_s",
)
ABSENT = "(not set)"
VALIDATION = "validation/"
NAMES = "ABCDEFGH"  # of the runs, in a table's columns; a page has as many colours
assert len(NAMES) == NUM_COLORS


def first_difference(a: Records, b: Records, name: str = "B") -> str | None:
    """Where the steps of ``name`` first differ from A's, in words, or None. Clock readings are left out, and what
    was validated where only one of them was.

    Numbers are equal when their text is: 0.0 and -0.0 differ, 1 and 1.0 differ. NaN and infinity are both
    recorded as null and equal.
    """
    if is_validated(a) != is_validated(b):
        a, b = without_validation(a), without_validation(b)
    for one, two in zip(a, b, strict=False):
        if one["step"] != two["step"]:
            return f"step {one['step']} in A stands where {name} has step {two['step']}"
        for key in dict.fromkeys([*one, *two]):
            if key.startswith(CLOCK):
                continue
            if key not in one or key not in two:
                return f"step {one['step']}: {key} is only in {'A' if key in one else name}"
            if repr(one[key]) != repr(two[key]):
                return f"step {one['step']}: {key} is {one[key]!r} in A, {two[key]!r} in {name}"
    if len(a) != len(b):
        longer, rest = ("A", a[len(b) :]) if len(a) > len(b) else (name, b[len(a) :])
        return f"step {rest[0]['step']} is only in {longer}"
    return None


def is_validated(records: Records) -> bool:
    return any(key.startswith(VALIDATION) for record in records for key in record)


def without_validation(records: Records) -> Records:
    """The steps without what was validated; there is none before training."""
    steps = [record for record in records if record["step"]]
    return [{key: value for key, value in each.items() if not key.startswith(VALIDATION)} for each in steps]


def config_differences(*configs: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Dotted keys whose values differ, as JSON text, one value for each configuration."""
    flat = [{key: json.dumps(value, ensure_ascii=False) for key, value in flatten(c).items()} for c in configs]
    rows = {key: tuple(each.get(key, ABSENT) for each in flat) for key in dict.fromkeys(key for c in flat for key in c)}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def metric_rows(*runs: Records) -> list[tuple[str, list[float | None]]]:
    """Means over the last tenth of each run, and the best step's reward, of what A and another one recorded."""
    rows = [(key, [ends([each.get(key) for each in records])[1] for records in runs]) for key in COMPARED]
    rows.insert(1, ("reward/mean, best step", [_best_reward(records) for records in runs]))
    return [(key, found) for key, found in rows if found[0] is not None and found[1:].count(None) < len(found) - 1]


def evaluation_differences(a: Path, b: Path, name: str = "B") -> tuple[str, dict[str, Difference]]:
    """What was compared, and ``b - a`` per metric; why not, and nothing, when they cannot be paired."""
    files = a / EVALUATION, b / EVALUATION
    if not all(file.is_file() for file in files):
        return "", {}
    found = [load_evaluations(file) for file in files]
    labels = ["after" if "after" in item else list(item)[-1] for item in found]
    try:
        pairs = differences(found[0][labels[0]], found[1][labels[1]])
    except ValueError as error:
        return f"{name} - A: no paired difference: {error}", {}
    return f"evaluation {labels[0]!r} of A against {labels[1]!r} of {name}, the same problems, one training each", pairs


def show(console: Console, runs: Sequence[Path]) -> None:
    """Print the comparison as tables."""
    names, records = NAMES[: len(runs)], [load_metrics(run) for run in runs]
    if len(runs) > 2:  # two are easily kept apart
        for name, run in zip(names, runs, strict=True):
            console.print(f"{name} is {run}", markup=False, highlight=False)
    changed = config_differences(*map(read_config, runs))
    if changed:
        table = _table("configuration", ("key", *names))
        for key, values in changed.items():
            table.add_row(*map(markup.escape, (key, *values)))
        console.print(table)
    else:
        console.print("the configurations are the same")
    others = [f"{name} - A" for name in names[1:]]
    table = _table("metrics, mean of the last tenth of the steps", ("metric", *names, *others))
    table.add_row("steps", *(str(each[-1]["step"]) for each in records))
    for key, (first, *rest) in metric_rows(*records):
        assert first is not None
        changes = ["-" if value is None else f"{value - first:+.3g}" for value in rest]
        table.add_row(key, *("-" if value is None else short(value) for value in (first, *rest)), *changes)
    console.print(table)
    for name, run in zip(names[1:], runs[1:], strict=True):
        _show_evaluation(console, name, *evaluation_differences(runs[0], run, name))


def _show_evaluation(console: Console, name: str, what: str, pairs: Mapping[str, Difference]) -> None:
    if not pairs:
        if what:
            console.print(what, markup=False)
        return
    table = _table(what, ("metric", f"{name} - A, points", "95 % interval", "p"))
    for metric, found in pairs.items():
        low, mean, high = (100 * x for x in (found.interval.low, found.interval.mean, found.interval.high))
        style = "" if not found.significant else "green" if mean > 0 else "red"
        table.add_row(metric, f"{mean:+.1f}", f"{low:+.1f} .. {high:+.1f}", f"{found.p_value:.2g}", style=style)
    console.print(table)


def overlay(runs: Sequence[Path]) -> str:
    """A page with every metric of all runs in one chart each, and the differing settings."""
    names, loaded = NAMES[: len(runs)], [load_metrics(run) for run in runs]
    steps = sorted({record["step"] for records in loaded for record in records})
    by_step = [{record["step"]: record for record in records} for records in loaded]
    keys = list(dict.fromkeys(key for records in loaded for each in records for key in each))
    keys.remove("step")
    figures, drawn, glossary = Figures(), [], read_glossary(runs[0])
    every_step = steps
    for key in keys:
        validated = key.startswith(VALIDATION)  # not in every step: a line joins those where it was
        steps = [step for step in every_step if not validated or any(key in found.get(step, {}) for found in by_step)]
        values = [[found.get(step, {}).get(key) for step in steps] for found in by_step]
        series = [Series(name, line, number) for number, (name, line) in enumerate(zip(names, values, strict=True))]
        metric = glossary.find(key)
        drawn.append(figures.add(key, metric.meaning if metric else "", steps, series))
    changed = config_differences(*map(read_config, runs)).items()
    rows = "".join(_html_row("td", key, *values) for key, values in changed)
    title = " against ".join(run.name for run in runs)
    where = ", ".join(f"{name} is {run}" for name, run in zip(names, runs, strict=True))
    body = (
        f'<h1>{escape(title)}</h1><p class="sub">{escape(where)}</p><h2>Settings that differ</h2>'
        f'<div class="card config"><table>{_html_row("th", "", *names)}{rows}</table></div>'
        f'<h2>Metrics</h2><div class="charts">{"".join(drawn)}</div>'
    )
    return page(title, body, figures.data)


def _html_row(tag: str, *cells: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("compare", __doc__)
    parser.add_argument("runs", type=Path, metavar="RUN", nargs="+", help=f"folders of 2 to {len(NAMES)} runs")
    parser.add_argument("--bitwise", action="store_true", help="only say whether all metrics are equal")
    parser.add_argument("--out", type=output_file, help="also write a page with all runs' curves")
    options = parser.parse_args(arguments)
    if not 2 <= len(options.runs) <= len(NAMES):
        parser.error(f"found {len(options.runs)} runs, expected 2 to {len(NAMES)}")
    if options.bitwise and options.out is not None:
        parser.error("--bitwise writes no page: leave out --out, or --bitwise")
    try:
        if options.bitwise:
            return _bitwise(options.runs)
        show(Console(), options.runs)
        if options.out is not None:
            options.out.write_text(overlay(options.runs), encoding="utf-8", errors="replace")
            print(options.out)
    except ValueError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    return 0


def _bitwise(runs: Sequence[Path]) -> int:
    first, *rest = [load_metrics(run) for run in runs]
    found = [first_difference(first, each, name) for name, each in zip(NAMES[1:], rest, strict=False)]
    for line in filter(None, found):
        print(f"not equal: {line}")
    if any(found):
        return 1
    print(f"equal to the bit: {len(first)} steps")
    return 0


def _best_reward(records: Records) -> float | None:
    return max((record["reward/mean"] for record in records if record.get("reward/mean") is not None), default=None)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


if __name__ == "__main__":
    sys.exit(main())

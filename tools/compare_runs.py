"""Two runs side by side: what was configured differently, what came out, and whether it is the same to the bit.

    python -m tools.compare_runs RUN_A RUN_B [--out compare.html]
    python -m tools.compare_runs RUN_A RUN_B --bitwise

``--bitwise`` compares every metric of every step except clock readings and names the first that differs.
Exit codes: 0 done (with ``--bitwise``: equal), 1 not equal, 2 a folder holds no run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich import markup
from rich.console import Console
from rich.table import Table

from megatron_ext.evaluation import Difference, differences
from megatron_ext.train.metrics import CLOCK_KEYS, CONFIG
from tools.charts import Figures, Series, short
from tools.evaluate import load_evaluations
from tools.report import ends, flatten, page
from tools.report_data import EVALUATION, load_metrics, read_config

Records = Sequence[Mapping[str, Any]]
COMPARED = (
    "reward/mean",
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


def first_difference(a: Records, b: Records) -> str | None:
    """Where two lists of steps first differ, in words, or None. Clock readings are left out.

    Numbers are equal when their text is: 0.0 and -0.0 differ, 1 and 1.0 differ. NaN and infinity are both
    recorded as null and equal.
    """
    for one, two in zip(a, b, strict=False):
        if one["step"] != two["step"]:
            return f"step {one['step']} in A stands where B has step {two['step']}"
        for key in dict.fromkeys([*one, *two]):
            if key.startswith(CLOCK_KEYS):
                continue
            if key not in one or key not in two:
                return f"step {one['step']}: {key} is only in {'A' if key in one else 'B'}"
            if repr(one[key]) != repr(two[key]):
                return f"step {one['step']}: {key} is {one[key]!r} in A, {two[key]!r} in B"
    if len(a) != len(b):
        longer, rest = ("A", a[len(b) :]) if len(a) > len(b) else ("B", b[len(a) :])
        return f"step {rest[0]['step']} is only in {longer}"
    return None


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Dotted keys whose values differ, as JSON text."""
    one, two = ({key: json.dumps(value, ensure_ascii=False) for key, value in flatten(c).items()} for c in (a, b))
    keys = dict.fromkeys([*one, *two])
    return {key: (one.get(key, ABSENT), two.get(key, ABSENT)) for key in keys if one.get(key) != two.get(key)}


def metric_rows(a: Records, b: Records) -> list[tuple[str, float, float]]:
    """Means over the last tenth of each run, and the best step's reward, of what both recorded."""
    rows = []
    for key in COMPARED:
        last_a, last_b = (ends([record.get(key) for record in records])[1] for records in (a, b))
        if last_a is not None and last_b is not None:
            rows.append((key, last_a, last_b))
    best_a, best_b = _best_reward(a), _best_reward(b)
    if best_a is not None and best_b is not None:
        rows.insert(1, ("reward/mean, best step", best_a, best_b))
    return rows


def evaluation_differences(a: Path, b: Path) -> tuple[str, dict[str, Difference]]:
    """What was compared, and ``B - A`` per metric; why not, and nothing, when they cannot be paired."""
    files = a / EVALUATION, b / EVALUATION
    if not all(file.is_file() for file in files):
        return "", {}
    found = [load_evaluations(file) for file in files]
    labels = ["after" if "after" in item else list(item)[-1] for item in found]
    try:
        pairs = differences(found[0][labels[0]], found[1][labels[1]])
    except ValueError as error:
        return f"no paired difference: {error}", {}
    return f"evaluation {labels[0]!r} of A against {labels[1]!r} of B, the same problems", pairs


def load_config(folder: Path) -> dict[str, Any]:
    return read_config(folder / CONFIG)


def show(console: Console, a: Path, b: Path) -> None:
    """Print the comparison as tables."""
    records = load_metrics(a), load_metrics(b)
    changed = config_differences(load_config(a), load_config(b))
    if changed:
        table = _table("configuration", ("key", "A", "B"))
        for key, (one, two) in changed.items():
            table.add_row(*map(markup.escape, (key, one, two)))
        console.print(table)
    else:
        console.print("the configurations are the same")
    table = _table("metrics, mean of the last tenth of the steps", ("metric", "A", "B", "B - A"))
    table.add_row("steps", str(records[0][-1]["step"]), str(records[1][-1]["step"]))
    for key, one, two in metric_rows(*records):
        table.add_row(key, short(one), short(two), f"{two - one:+.3g}")
    console.print(table)
    what, pairs = evaluation_differences(a, b)
    if pairs:
        table = _table(what, ("metric", "B - A, points", "95 % interval", "p"))
        for name, found in pairs.items():
            low, mean, high = (100 * x for x in (found.interval.low, found.interval.mean, found.interval.high))
            style = "" if not found.significant else "green" if mean > 0 else "red"
            table.add_row(name, f"{mean:+.1f}", f"{low:+.1f} .. {high:+.1f}", f"{found.p_value:.2g}", style=style)
        console.print(table)
    elif what:
        console.print(what, markup=False)


def overlay(a: Path, b: Path) -> str:
    """A page with every metric of both runs in one chart each, and the differing settings."""
    runs = load_metrics(a), load_metrics(b)
    steps = sorted({record["step"] for records in runs for record in records})
    by_step = [{record["step"]: record for record in records} for records in runs]
    keys = [key for key in dict.fromkeys(key for records in runs for key in records[0]) if key != "step"]
    figures, drawn = Figures(), []
    for key in keys:
        values = [[found.get(step, {}).get(key) for step in steps] for found in by_step]
        series = [Series(name, line, number) for number, (name, line) in enumerate(zip("AB", values, strict=True))]
        drawn.append(figures.add(key, "", steps, series))
    changed = config_differences(load_config(a), load_config(b)).items()
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(x)}</td><td>{escape(y)}</td></tr>" for k, (x, y) in changed)
    head = "<tr><th></th><th>A</th><th>B</th></tr>"
    body = (
        f'<h1>{escape(a.name)} against {escape(b.name)}</h1><p class="sub">A is {escape(str(a))}, B is {escape(str(b))}'
        f'</p><h2>Settings that differ</h2><div class="card config"><table>{head}{rows}</table></div>'
        f'<h2>Metrics</h2><div class="charts">{"".join(drawn)}</div>'
    )
    return page(f"{a.name} against {b.name}", body, figures.data)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.compare_runs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("a", type=Path, metavar="RUN_A")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument("--bitwise", action="store_true", help="only say whether all metrics are equal")
    parser.add_argument("--out", type=Path, help="also write a page with both runs' curves")
    options = parser.parse_args(arguments)
    try:
        if options.bitwise:
            records = load_metrics(options.a), load_metrics(options.b)
            found = first_difference(*records)
            print(f"not equal: {found}" if found else f"equal to the bit: {len(records[0])} steps")
            return 1 if found else 0
        show(Console(), options.a, options.b)
        if options.out is not None:
            options.out.write_text(overlay(options.a, options.b), encoding="utf-8", errors="replace")
            print(options.out)
    except ValueError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
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

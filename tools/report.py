"""A run's folder as one page: curves, evaluation, and responses with every token coloured by its entropy.

    python -m tools.report RUN_DIR

writes ``RUN_DIR/report.html``. The page is self-contained: no request leaves it, and its content security
policy allows the one script below by hash and nothing else. All text of models and data is escaped.
Reads ``metrics.jsonl`` and, when they exist, ``config.json``, ``samples.jsonl`` and ``evaluation.json``.
Exit codes: 0 done, 2 the folder holds no run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from html import escape
from pathlib import Path
from typing import Any

from megatron_ext.evaluation import differences
from megatron_ext.train.metrics import CONFIG, METRICS, SAMPLES, read_steps
from megatron_ext.train.redact import redact
from tools.charts import LEFT, NUM_COLORS, RIGHT, WIDTH, Series, area_chart, interval_plot, legend, line_chart, short
from tools.evaluate import load_evaluations
from tools.report_style import SCRIPT, STYLE
from tools.report_tokens import pick_samples, samples

EVALUATION = "evaluation.json"
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A place on the page for the metrics whose names match ``keys`` (shell patterns, in drawing order)."""

    section: str
    title: str
    note: str
    keys: tuple[str, ...]
    percent: bool = False
    stacked: bool = False


CHARTS = (
    Chart("Learning", "Reward", "mean over the step's responses", ("reward/mean",)),
    Chart(
        "Learning",
        "Outcomes",
        "why responses earned what they earned",
        ("reward/outcome/correct", "reward/outcome/*"),
        percent=True,
        stacked=True,
    ),
    Chart("Learning", "Groups", "all responses alike: nothing to learn", ("group/*",), percent=True),
    Chart("Entropy", "Entropy", "nats per token, whole vocabulary and nucleus", ("entropy/full", "entropy/nucleus")),
    Chart(
        "Entropy",
        "Peak entropy",
        "of the selected tokens, against its anchor",
        ("siren/hbar", "siren/*anchor", "*/anchor"),
    ),
    Chart("Entropy", "Selected tokens", "share of tokens the method acts on", ("*/selected_share",), percent=True),
    Chart("Entropy", "Nucleus size", "tokens that hold the nucleus' mass", ("entropy/nucleus_size",)),
    Chart("Update", "Loss", "as minimised", ("loss/*",)),
    Chart("Update", "Skipped updates", "the gradient was not finite", ("grad/skipped", "critic/skipped")),
    Chart("Update", "Gradient norm", "before clipping", ("grad/norm", "critic/grad_norm")),
    Chart("Update", "Clipped tokens", "probability ratio beyond its bounds", ("clip/*",), percent=True),
    Chart("Update", "KL", "divergence per token", ("kl/*",)),
    Chart("Update", "Learning rate", "", ("optimizer/lr", "critic/lr")),
    Chart("Critic", "Value", "mean over tokens, and the return it predicts", ("critic/value", "critic/return")),
    Chart(
        "Critic", "Explained variance", "of the returns; 0 = no better than a constant", ("critic/explained_variance",)
    ),
    Chart("Critic", "Clipped values", "moved too far in one step", ("critic/clipped",), percent=True),
    Chart("Responses", "Length", "tokens per response", ("response/length",)),
    Chart("Responses", "Cut off", "responses that reached the limit", ("response/truncated",), percent=True),
    Chart("Responses", "Mismatch", "|log-prob of the engine - of the trainer|", ("mismatch/mean", "mismatch/max")),
    Chart("Machine", "Time", "seconds per step, by phase", ("time/*",), stacked=True),
    Chart("Machine", "Speed", "tokens per second", ("speed/*",)),
    Chart("Machine", "Imbalance", "tokens of the data-parallel rank with the most, over the mean", ("data/imbalance",)),
)
HIDDEN = ("step", "time/step_s", "time/save_background_s")  # the last one overlaps with other phases
COUNTERS = ("reward/outcome/", "reward/nan", "grad/skipped", "group/single")
OUTCOME_COLORS = {0: 2, 2: 0}  # correct is green, the others keep their place in the palette


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page to ``out`` (``report.html`` in the run's folder) and return where. Raises as ``report``."""
    html = report(run_dir)
    target = Path(out) if out is not None else Path(run_dir) / "report.html"
    target.write_text(html, encoding="utf-8", errors="replace")
    return target


def report(run_dir: str | Path) -> str:
    """The page of a run's folder. Raises ValueError when there is no run in it or a file is damaged."""
    folder = Path(run_dir)
    records = load_metrics(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).exists() else {}
    config = redact(config)
    name = str(config.get("name") or folder.resolve().name)
    method, model = config.get("method", {}).get("name"), config.get("model", {}).get("path")
    about = [f"method {method}" if method else "", f"model {Path(model).name}" if model else ""]
    about.append(f"{len(records)} steps recorded")
    curves, chart_data = charts(records)
    body = [
        f'<h1>{escape(name)}</h1><p class="sub">{escape(" · ".join(part for part in about if part))}</p>',
        tiles(records, config),
        evaluations(load_evaluations(folder / EVALUATION)) if (folder / EVALUATION).exists() else "",
        curves,
        samples(pick_samples(folder / SAMPLES, [record["step"] for record in records])),
        configuration(config),
    ]
    return page(name, "".join(body), chart_data)


def load_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run. Raises ValueError when there are none."""
    path = folder / METRICS
    records = list(read_steps(path)) if path.is_file() else []
    if not records:
        raise ValueError(f"{folder}: expected the folder of a run with {METRICS}, found no finished step there")
    return records


def page(title: str, body: str, chart_data: Sequence[Mapping[str, Any]]) -> str:
    """A whole document around ``body``; ``chart_data`` feeds the tooltips."""
    data = json.dumps({"charts": chart_data, "width": WIDTH, "left": LEFT, "right": RIGHT}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no "</script>" inside the script element
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><main>{body}</main><div id="tip"></div>'
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def tiles(records: Records, config: Mapping[str, Any]) -> str:
    """The run in six numbers; ``from`` and ``to`` are means over the first and last tenth of the steps."""
    total = config.get("train", {}).get("steps")
    seconds = math.fsum(record.get("time/step_s") or 0.0 for record in records)
    found = [("steps", f"{records[-1]['step']}", f"of {total}" if total else "")]
    for label, key, percent in (
        ("reward", "reward/mean", False),
        ("entropy, nats", "entropy/full", False),
        ("response tokens", "response/length", False),
        ("cut off", "response/truncated", True),
    ):
        first, last = ends(records, key)
        if last is not None:
            found.append((label, short(last, percent), f"from {short(first, percent)}"))
    if seconds:
        time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
        found.append(("time", time, f"{seconds / len(records):.3g} s per step"))
    cards = [
        f'<div class="card tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for label, value, note in found
    ]
    return f'<div class="tiles">{"".join(cards)}</div>'


def ends(records: Records, key: str) -> tuple[float | None, float | None]:
    """Means of a metric over the first and the last tenth of the steps that have it; None without any."""
    values = [record[key] for record in records if record.get(key) is not None]
    if not values:
        return None, None
    tenth = max(1, len(values) // 10)
    return math.fsum(values[:tenth]) / tenth, math.fsum(values[-tenth:]) / tenth


def charts(records: Records) -> tuple[str, list[dict[str, Any]]]:
    """All curves by section, and what their tooltips say. Metrics nobody planned for come last."""
    names = list(dict.fromkeys(name for record in records for name in record if name not in HIDDEN))
    steps = [record["step"] for record in records]
    placed: set[str] = set()
    html, data, section = [], [], ""

    def add(chart: Chart, keys: Sequence[str]) -> None:
        nonlocal section
        if chart.section != section:
            html.append(f'{"</div>" if section else ""}<h2>{escape(chart.section)}</h2><div class="charts">')
            section = chart.section
        series = [_series(records, key, number, len(keys)) for number, key in enumerate(keys)]
        html.append(chart_figure(chart, steps, series, len(data)))
        data.append(tooltip(chart, steps, series))
        placed.update(keys)

    for chart in CHARTS:
        matching = (name for pattern in chart.keys for name in names if fnmatch(name, pattern))
        keys = [name for name in dict.fromkeys(matching) if name not in placed and _says_something(records, name)]
        if keys:
            add(chart, keys)
    rest = [name for name in names if name not in placed and _says_something(records, name)]
    for name in rest:
        add(Chart("More", name, "", (name,)), [name])
    return "".join(html) + ("</div>" if section else ""), data


def chart_figure(chart: Chart, steps: Sequence[int], series: Sequence[Series], number: int) -> str:
    draw = area_chart if chart.stacked else line_chart
    return (
        f'<figure data-chart="{number}"><h3>{escape(chart.title)}</h3><p>{escape(chart.note) or "&nbsp;"}</p>'
        f"{draw(steps, series, percent=chart.percent)}{legend(series, percent=chart.percent)}</figure>"
    )


def tooltip(chart: Chart, steps: Sequence[int], series: Sequence[Series]) -> dict[str, Any]:
    values = [[None if v is None else float(f"{v:.5g}") for v in line.values] for line in series]
    return {"steps": list(steps), "names": [s.name for s in series], "values": values, "percent": chart.percent}


def evaluations(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics of every label side by side, and the paired difference of the last to the first."""
    labels = list(found)
    first, last = found[labels[0]], found[labels[-1]]
    try:
        pairs = differences(first, last) if len(labels) > 1 else {}
        why = ""
    except ValueError as error:
        pairs, why = {}, f"No paired difference: {error}."
    head = "".join(
        f'<th class="n"><span class="key" style="--key:var(--c{number % NUM_COLORS})"></span>{escape(label)}</th>'
        for number, label in enumerate(labels)
    )
    if pairs:
        head += f'<th class="n">{escape(labels[-1])} − {escape(labels[0])}, points</th>'
    names = dict.fromkeys(name for item in found.values() for name in item["metrics"])
    rows = []
    for name in names:
        cells, dots = [], []
        for number, item in enumerate(found.values()):
            value = item["metrics"].get(name)
            cells.append(f'<td class="n">{_interval(value)}</td>')
            if value:
                dots.append((value["mean"], value["low"], value["high"], number))
        if pairs:
            cells.append(f'<td class="n">{_difference(pairs[name]) if name in pairs else "-"}</td>')
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}<td>{interval_plot(dots)}</td></tr>")
    decoding = last["decoding"]
    note = (
        f"{last['num_problems']} problems of {Path(last['data']['path']).name}, {decoding['samples']} responses each, "
        f"T {decoding['temperature']:g}, top-p {decoding['top_p']:g}, "
        f"at most {decoding['max_response_tokens']} tokens. "
        f"95 % intervals by bootstrap over problems. {why}"
    )
    return (
        f'<h2>Evaluation</h2><div class="card"><table><tr><th></th>{head}<th>0 … 1</th></tr>{"".join(rows)}'
        f'</table></div><p class="sub">{escape(note)}</p>'
    )


def configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for key, value in flatten(config).items()
    )
    return (
        "<h2>Configuration</h2><details><summary>All settings</summary>"
        f'<div class="card config"><table>{rows}</table></div></details>'
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, help="where to write (RUN_DIR/report.html)")
    options = parser.parse_args(arguments)
    try:
        target = write_report(options.run_dir, options.out)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")
    return 0


def _series(records: Records, key: str, number: int, count: int) -> Series:
    name = key if count == 1 else key.split("/", 1)[-1].removeprefix("outcome/")
    color = OUTCOME_COLORS.get(number, number) if key.startswith("reward/outcome/") else number
    return Series(name, [record.get(key) for record in records], color, key.endswith("anchor"))


def _says_something(records: Records, name: str) -> bool:
    """A metric that is missing everywhere, or counts something that never happened, gets no curve."""
    values = [record.get(name) for record in records]
    return any(values) if name.startswith(COUNTERS) else any(value is not None for value in values)


def _interval(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.1%} <small>{value['low']:.1%} … {value['high']:.1%}</small>"


def _difference(found: Any) -> str:
    interval = found.interval
    kind = "" if not found.significant else "up" if interval.mean > 0 else "down"
    return (
        f'<span class="{kind}">{100 * interval.mean:+.1f}</span> '
        f"<small>{100 * interval.low:+.1f} … {100 * interval.high:+.1f}</small>"
    )


if __name__ == "__main__":
    sys.exit(main())

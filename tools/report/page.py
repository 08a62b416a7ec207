"""A run's folder as one page: curves, evaluation, and responses with every token coloured by its entropy.

    megatron-entropy report RUN_DIR

writes ``RUN_DIR/report.html``. The page is self-contained: no request leaves it, and its content security
policy allows the one script below by hash and nothing else. All text of models and data is escaped.
Reads ``metrics.jsonl`` and, when they exist, ``config.json``, ``samples.jsonl``, ``timeline.jsonl``, ``planner.json``
and ``evaluation.json``.
Exit codes: 0 done, 2 the folder holds no run, or one of these files is damaged.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ext.metrics.glossary import GLOSSARY
from megatron_ext.metrics.writer import SAMPLES

from ..arguments import command_parser
from ..charts import LEFT, RIGHT, WIDTH, Figures, short
from .curves import curves
from .data import (
    EVALUATION,
    Metrics,
    read_config,
    read_evaluations,
    read_glossary,
    read_metrics,
    read_responses,
    section,
)
from .evaluation import evaluations
from .planned import planned
from .style import SCRIPT, STYLE
from .timeline import timeline
from .tokens import keep, pick, problem_table, samples, token_table

TILES = ("reward/mean", "entropy/full", "response/length", "response/truncated")


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page to ``out`` (``report.html`` in the run's folder) and return where. Raises as ``report``."""
    html = report(run_dir)
    target = Path(out) if out is not None else Path(run_dir) / "report.html"
    target.write_text(html, encoding="utf-8", errors="replace")
    return target


def report(run_dir: str | Path) -> str:
    """The page of a run's folder. Raises ValueError when there is no run in it or a file is damaged."""
    folder = Path(run_dir)
    metrics = read_metrics(folder)
    config = read_config(folder)
    found = read_evaluations(folder / EVALUATION)
    kept = keep(read_responses(folder / SAMPLES), metrics.steps)
    name = str(config.get("name") or folder.resolve().name)
    method, model = section(config, "method").get("name"), section(config, "model").get("path")
    about = [f"method {method}" if method else "", f"model {Path(str(model)).name}" if model else ""]
    num_steps = sum(step > 0 for step in metrics.steps)  # 0 is a validation before training
    about.append(f"{num_steps} step{'s' if num_steps != 1 else ''} recorded")
    figures = Figures()
    body = [
        f'<h1>{escape(name)}</h1><p class="sub">{escape(" · ".join(part for part in about if part))}</p>',
        tiles(metrics, section(config, "train").get("steps")),
        evaluations(found, figures),
        curves(metrics, read_glossary(folder), figures),
        timeline(folder, metrics),
        planned(folder),
        token_table(kept),
        problem_table(kept),
        samples(pick(kept.by_step)),
        configuration(config),
    ]
    return page(name, "".join(body), figures.data)


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


def tiles(metrics: Metrics, planned: Any) -> str:
    """The run in six numbers; means over the last tenth of the steps and, behind ``from``, over the first."""
    seconds = math.fsum(value or 0.0 for value in metrics.values("time/step_s"))
    num_steps = max(1, sum(step > 0 for step in metrics.steps))
    found = [("steps", f"{metrics.steps[-1]}", f"of {planned}" if planned else "")]
    for metric in map(GLOSSARY.require, TILES):
        first, last = ends(metrics.values(metric.name))
        percent = metric.unit.startswith("share")
        if last is not None:
            found.append((metric.title.lower(), short(last, percent), f"from {short(first, percent)}"))
    if seconds:
        size, unit = next(each for each in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= each[0] or each[0] == 1)
        found.append(("time", f"{short(seconds / size)} {unit}", f"{short(seconds / num_steps)} s per step"))
    cards = [
        f'<div class="card tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for label, value, note in found
    ]
    means = "Means over the last tenth of the steps, from those over the first." if num_steps >= 20 else ""
    return f'<div class="tiles">{"".join(cards)}</div><p class="sub">{means}</p>'


def ends(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Means over the first and the last tenth of the values there are; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    tenth = max(1, len(known) // 10)
    return math.fsum(known[:tenth]) / tenth, math.fsum(known[-tenth:]) / tenth


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
    parser = command_parser("report", __doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, help="where to write (RUN_DIR/report.html)")
    options = parser.parse_args(arguments)
    try:
        target = write_report(options.run_dir, options.out)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

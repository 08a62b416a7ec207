"""The main job on a laptop: train the tiny model with SIREN, evaluate before and after, export, report.

    python -m tools.quickstart [key=value ...]

Runs the ordinary tools one after the other: tools.evaluate (before), tools.train, tools.convert to-hf,
tools.evaluate (after), tools.report. Everything lands under runs/quickstart/; a second call resumes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

RECIPE = "recipes/siren/siren-tiny-cpu.toml"
BASE = "recipes/tiny/base"
HELD_OUT = "recipes/tiny/data/eval.jsonl"
RUN = Path("runs/quickstart")
EVALUATION = RUN / "evaluation.json"
ROWS = ("avg@8", "maj@8", "pass@8")


def main(overrides: list[str] | None = None) -> int:
    console, start = Console(), time.monotonic()
    if (RUN / "hf").exists():
        console.print(f"{RUN} is finished; remove it to start over", markup=False)
    else:
        for title, command in (
            ("before", evaluate(BASE, "before")),
            ("train", ["tools.train", RECIPE, 'name="quickstart"', *(overrides or [])]),
            ("export", ["tools.convert", "to-hf", str(RUN), str(RUN / "hf")]),
            ("after", evaluate(str(RUN / "hf"), "after")),
        ):
            console.rule(title)
            code = subprocess.run([sys.executable, "-m", *command]).returncode
            if code:
                return code
    from tools.report import write_report

    report = write_report(RUN)
    console.rule("result")
    console.print(result())
    for path in (report, RUN / "metrics.jsonl", EVALUATION, RUN / "hf"):
        console.print(f"  {path}", markup=False, highlight=False)
    console.print(f"  {time.monotonic() - start:.0f} s", highlight=False)
    return 0


def evaluate(model: str, label: str) -> list[str]:
    options = ["--data", HELD_OUT, "--samples", "8", "--max-response-tokens", "32"]
    return ["tools.evaluate", model, *options, "--out", str(EVALUATION), "--label", label]


def result() -> Table:
    """Before, after and their paired difference with its 95 % interval."""
    from megatron_ext.evaluation import differences
    from tools.evaluate import load_evaluations

    found = load_evaluations(EVALUATION)
    before, after = found["before"], found["after"]
    changes = differences(before, after)
    table = Table(title=f"{after['num_problems']} held-out problems, 8 responses each")
    for name in ("metric", "before", "after", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name in ROWS:
        change = changes[name].interval
        table.add_row(
            name,
            f"{before['metrics'][name]['mean']:.1%}",
            f"{after['metrics'][name]['mean']:.1%}",
            f"{change.mean:+.1%}",
            f"{change.low:+.1%} .. {change.high:+.1%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The main job on a laptop: train the tiny model with SIREN, evaluate before and after, export, report.

    megatron-entropy quickstart [--engine vllm] [key=value ...]

Runs the ordinary commands one after the other: evaluate (before), train, convert to-hf, evaluate (after), report.
Everything lands under runs/quickstart/ (runs/quickstart-vllm/); a second call resumes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ext.config.schema import RolloutConfig
from megatron_ext.rollout.registry import ENGINES

from . import command
from .arguments import command_parser

RECIPE = "recipes/siren/siren-tiny-cpu.toml"
BASE = "recipes/tiny/base"
HELD_OUT = (  # options of evaluate
    *("--data", "recipes/tiny/data/eval.jsonl", "--samples", "8"),
    *("--max-prompt-tokens", "48", "--max-response-tokens", "32"),
)
EVALUATION = "evaluation.json"
ROWS = ("avg@8", "maj@8", "pass@8")
DEFAULT = RolloutConfig().engine
COLOCATED = [name for name, engine in ENGINES.items() if engine.colocated]


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("quickstart", __doc__)
    parser.add_argument("--engine", choices=COLOCATED, default=DEFAULT, help="what samples responses (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for example train.steps=20")
    options = parser.parse_intermixed_args(arguments)
    console, start = Console(), time.monotonic()
    name = "quickstart" if options.engine == DEFAULT else f"quickstart-{options.engine}"
    run = Path("runs") / name
    if is_done("after", run):
        console.print(f"{run} is finished; remove it to start over", markup=False)
    else:
        for title, (tool, *rest) in (
            ("before", evaluate(BASE, "before", run, options.engine)),
            ("train", train(name, options.engine, options.overrides)),
            ("export", ["convert", "to-hf", str(run), str(run / "hf")]),
            ("after", evaluate(str(run / "hf"), "after", run, options.engine)),
        ):
            if is_done(title, run):
                continue
            console.rule(title)
            code = subprocess.run(command(tool, *rest)).returncode
            if code:
                return code
    from .report.page import write_report

    report = write_report(run)
    console.rule("result")
    console.print(result(run))
    for path in (report, run / "metrics.jsonl", run / EVALUATION, run / "hf"):
        console.print(f"  {path}", markup=False, highlight=False)
    console.print(f"  {time.monotonic() - start:.0f} s", highlight=False)
    return 0


def is_done(title: str, run: Path) -> bool:
    """Whether a call before this one got so far. Training knows by itself where it stopped."""
    from .evaluate import load_evaluations

    if title in ("train", "export"):
        return title == "export" and (run / "hf").exists()
    return (run / EVALUATION).exists() and title in load_evaluations(run / EVALUATION)


def train(name: str, engine: str, overrides: Sequence[str]) -> list[str]:
    own = ["rollout.enforce_eager=true"] if reads_enforce_eager(engine) else []
    return ["train", RECIPE, f"name={name}", f"rollout.engine={engine}", *own, *overrides]


def reads_enforce_eager(engine: str) -> bool:
    """Whether compiling, which takes longer than the whole quickstart, is to be turned off for the engine."""
    return "enforce_eager" in ENGINES[engine].keys


def evaluate(model: str, label: str, run: Path, engine: str) -> list[str]:
    sampling = ["--engine", engine, *(["--enforce-eager"] if reads_enforce_eager(engine) else [])]
    return ["evaluate", model, *HELD_OUT, *sampling, "--out", str(run / EVALUATION), "--label", label]


def result(run: Path) -> Table:
    """Before, after and their paired difference with its 95 % interval."""
    from megatron_ext.metrics.eval_stats import differences

    from .evaluate import load_evaluations

    found = load_evaluations(run / EVALUATION)
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

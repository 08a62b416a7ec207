"""Train every method on the tiny task with several seeds, and write what each does to entropy on one page.

    megatron-entropy lab                          everything in recipes/lab/lab.toml; run it again to continue
    megatron-entropy lab --only 'entropic*' --seeds 1
    megatron-entropy lab --dry-run                the commands, one a line, and how much it is; nothing is run
    megatron-entropy lab --page                   only write the page of what is finished
    megatron-entropy lab --out docs/lab           only what docs/lab/results does not have yet
    megatron-entropy lab --page --out docs/lab    draw the repository's page anew from docs/lab/results
    megatron-entropy lab --plan recipes/league/league.toml --dir runs/league            every method, in three regimes
    megatron-entropy lab --plan recipes/league/league.toml --dir runs/league --choose   what its trials chose

Two trainings at a time on two cores (--jobs), one process each. A finished run is never repeated and a stopped one
continues from its checkpoint. The page is OUT/index.html, its tables are OUT/README.md, and the numbers of both are
OUT/results/RUN.json, which a page without runs is drawn from. With an OUT of its own, seeds that are there stay and are
not done again, so that a lab may be made in parts, on several machines (remove a file to have its run made anew).

A plan with a tuning has runs that wait for a choice: --choose makes it of every method whose trials are finished, and
writes the file that the plan calls "chosen"; the same command without it then goes on with the tuned runs.

Exit codes: 0 done, 75 stopped by a signal with everything saved (run it again), 2 configuration, 1 a run failed
(its log is named).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_ext.config.errors import ConfigError

from ..arguments import command_parser
from . import league_page, page
from .claims import read_claims
from .plan import Job, LabPlan, jobs, load_plan
from .results import load
from .runs import EVALUATION_STEPS, LOG, Running, RunResult, alone, preload, steps_done, work
from .sizes import sizes
from .store import collect, left_to_do
from .tuning import choose, write_chosen

CONFIGURATION, REQUEUE = 2, 75
LINE_EVERY_S = 30.0  # without a terminal


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        plan = load_plan(options.plan)
        if options.only:
            plan = plan.select(options.only)
        plan = replace(plan, seeds=options.seeds or plan.seeds, steps=options.steps)
        if not plan.regimes:
            read_claims(plan.claims)  # a faulty list is not found after hours of training
        if options.choose:
            return choose_settings(plan, options.dir, options.out or options.dir)
        if plan.waiting:
            print(f"lab: {plan.waiting}", file=sys.stderr)
        todo = jobs(plan, options.dir)
        if options.out and options.out != options.dir:
            todo = left_to_do(plan, todo, options.out)
        if options.dry_run:
            return dry_run(todo, options.out or options.dir)
        outcome = RunResult()
        if not options.page:
            with alone(options.dir):
                outcome = run(todo, options.jobs)
    except ConfigError as error:
        print(f"lab: {error}", file=sys.stderr)
        return CONFIGURATION
    try:
        return finish(plan, options.dir, options.out or options.dir, outcome)
    except ConfigError as error:
        print(f"lab: {error}", file=sys.stderr)
        return CONFIGURATION


def dry_run(todo: Sequence[Job], out: Path) -> int:
    for job in todo:
        for command in job.commands:
            print("megatron-entropy", shlex.join(command), "  # finished" if job.finished else "")
    print("\n".join(sizes(todo, out)))
    return 0


def choose_settings(plan: LabPlan, folder: Path, out: Path) -> int:
    """Write what the finished trials chose. Raises ConfigError for a plan without a tuning, or where none is finished
    of all of a run's trials."""
    if plan.tuning is None:
        raise ConfigError("--choose: the plan has no tuning")
    collect(plan, folder, out)
    choices = choose(plan, load(plan, out))
    if not choices:
        raise ConfigError(
            "--choose: no run has all its trials finished; run the plan's trials first (--only '*.trial*')"
        )
    write_chosen(plan.tuning, choices)
    for axis in plan.tuning.axes:
        choice = choices.get(axis.run)
        said = "its trials are not finished" if choice is None else " ".join(axis.overrides(choice.trial)) or "its own"
        print(f"{axis.run}: {said}")
    print(f"{plan.tuning.path}: {len(choices)} of {len(plan.tuning.axes)} chosen")
    return 0


def run(todo: Sequence[Job], num_at_once: int) -> RunResult:
    """Do the jobs with a live display: a bar over all training steps, and the runs at work."""
    console = Console()
    total = sum(job.steps + EVALUATION_STEPS for job in todo)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    preload()
    # no refreshing thread: a child forked while it holds a lock would never get it
    bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, speed_estimate_period=300)
    task = bar.add_task("lab", total=total, completed=sum(map(steps_done, todo)))
    spoken = time.monotonic()

    def show(running: Sequence[Running]) -> None:
        nonlocal spoken
        done, finished = sum(map(steps_done, todo)), sum(job.finished for job in todo)
        names = ", ".join(child.job.name for child in running) or "done"
        bar.update(task, completed=done, description=f"{finished}/{len(todo)} runs, now {names}")
        if console.is_terminal:
            bar.refresh()
        elif time.monotonic() - spoken > LINE_EVERY_S:
            spoken = time.monotonic()
            remaining = bar.tasks[0].time_remaining
            eta = "" if remaining is None else f", {remaining / 60:.0f} min left"
            console.print(f"{done}/{total} steps, {finished}/{len(todo)} runs{eta}: {names}", highlight=False)

    if console.is_terminal:
        bar.start()
    try:
        return work(todo, num_at_once, show)
    finally:
        bar.stop()


def finish(plan: LabPlan, folder: Path, out: Path, outcome: RunResult) -> int:
    """Write the page, name what failed, and return the exit code."""
    collect(plan, folder, out)
    for path in (league_page if plan.regimes else page).write(plan, out):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    for job, why in outcome.failed:
        print(f"lab: {job.name}: {why}; see {job.folder / LOG}", file=sys.stderr)
    return REQUEUE if outcome.interrupted else 1 if outcome.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("lab", __doc__)
    add = parser.add_argument
    add("--plan", type=Path, default=Path("recipes/lab/lab.toml"), help="default: %(default)s")
    add("--dir", type=Path, default=Path("runs/lab"), help="folder of the runs (default: %(default)s)")
    add("--out", type=Path, help="folder of the page (default: that of the runs)")
    add("--only", nargs="+", default=[], metavar="RUN", help="names or patterns of runs, and what they start from")
    add("--seeds", type=_positive, help="default: the plan's")
    add("--steps", type=_positive, help="training steps of every run (default: the plan's)")
    add("--jobs", type=_positive, default=2, help="runs at a time (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the commands")
    add("--page", action="store_true", help="only write the page of what is finished")
    add("--choose", action="store_true", help="only choose from the finished trials of the plan's tuning")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())

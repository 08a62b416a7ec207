"""Kill the tiny run at random moments, resume it until it is done, compare it with one that nobody killed.

    make soak MINUTES=20 SEED=7                 python -m tests.soak --minutes 20 --seed 7

Ranks, launcher and reward workers are struck while they start, load, sync, sample, score, train, write and publish a
checkpoint, and end (strikes.py). After each strike: the exit code and the words are those that README promises, no
process, lock or shared memory is left, the checkpoint that ``latest`` names is whole, every step so far is the
uninterrupted run's. When a run is done: its weights, optimizer, method's and other state, metrics and samples are those
of the uninterrupted one to the bit, and no temporary file is left (compare.py).

A seed says which strikes come in which order. When they land is up to the machine too: a fault may need several runs
with its seed to come again. At the first fault the soak ends: exit code 1, and the folder is kept.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.soak import compare, strikes
from tests.soak.strikes import Fault, Pace, Strike, Struck
from tests.soak.watched_run import PHASES, ROOT, Recipe, WatchedRun

WORLD = 2
RECIPES = (  # methods with state, every kind of layout that two ranks have, saves beside training and in its way
    Recipe("entropic, TP 2", "entropic/entropic-tiny-cpu.toml", ("checkpoint.every=1",), 8),
    Recipe(
        "aer, DP 2",
        "aer/aer-tiny-cpu.toml",
        ("checkpoint.every=2", "parallel.tensor=1", "method.alpha_0=0.05", 'log.trackers=["tensorboard"]'),
        8,
    ),
    Recipe(
        "siren, PP 2",
        "siren/siren-tiny-cpu.toml",
        ("checkpoint.every=1", "parallel.tensor=1", "parallel.pipeline=2", "checkpoint.asynchronous=false"),
        8,
    ),
)
MAX_STOPS = 3  # in a row without progress: then a run is refused, as README says, until it is left alone
NUM_PROBLEMS = 256  # of the tiny task: loading all takes longer than training


class Soak:
    """Runs below ``folder``, struck and compared; ``say`` takes a line for every strike and every run."""

    def __init__(self, folder: Path, say: Callable[[str], object]) -> None:
        self.folder, self.say, self.began = folder, say, time.monotonic()
        self.strikes: Counter[tuple[str, str]] = Counter()  # by kind and phase
        self.exit_codes: Counter[int] = Counter()
        self.num_runs = 0
        self._references: dict[str, tuple[WatchedRun, Pace]] = {}
        self._data = folder / "problems.jsonl"
        lines = (ROOT / "recipes/tiny/data/train.jsonl").read_text().splitlines(keepends=True)
        self._data.write_text("".join(lines[:NUM_PROBLEMS]))

    def run(self, recipe: Recipe, coming: Iterator[Strike]) -> None:
        """One run of ``recipe`` to its end, in as many lives as ``coming`` makes of it. Raises Fault."""
        reference, pace = self.reference(recipe)
        self.num_runs += 1
        run = WatchedRun(self.folder / f"run-{self.num_runs:03d}", recipe, self._data)
        code, fruitless = None, 0  # stops in a row before anything new was saved
        try:
            while code != strikes.DONE:
                saved = run.steps_saved()
                code, decisive = self._life(run, pace, coming, spared=fruitless >= MAX_STOPS)
                stopped = code in (strikes.REQUEUE, strikes.NO_PROGRESS)
                fruitless = 0 if run.steps_saved() > saved else fruitless + stopped
                _check(run, reference, code, decisive)
                if code == strikes.NO_PROGRESS and fruitless < MAX_STOPS:
                    raise Fault(f"exit code {code} after {fruitless} stops in a row before anything new was saved")
            _compare(run, reference)
        except Fault as fault:
            raise Fault(f"{recipe.name}, {run.log}: {fault}") from None
        finally:
            run.kill()
        self._say(f"run {self.num_runs} ({recipe.name}): {run.lives} lives, equal to the bit")
        shutil.rmtree(run.folder)

    def table(self) -> Table:
        """Strikes by kind and phase."""
        phases = [phase for phase in PHASES if any(where == phase for _, where in self.strikes)]
        table = Table("strike", *phases, "all")
        for kind in map(str, strikes.KINDS):
            counts = [self.strikes[kind, phase] for phase in phases]
            table.add_row(kind, *(str(count or "") for count in counts), str(sum(counts)))
        sums = [sum(count for (_, where), count in self.strikes.items() if where == phase) for phase in phases]
        table.add_row("all", *map(str, sums), str(sum(sums)), style="bold")
        return table

    def _life(
        self, run: WatchedRun, pace: Pace, coming: Iterator[Strike], *, spared: bool
    ) -> tuple[int, Struck | None]:
        """From a start to its end: the exit code, and the strike that was to end it. A ``spared`` run saves first."""
        saved = run.steps_saved()
        run.start()
        decisive = None
        while spared and run.process.poll() is None and run.steps_saved() == saved:
            time.sleep(0.01)
        while decisive is None and run.process.poll() is None and (strike := next(coming, None)) is not None:
            if (struck := strikes.make(strike, run, pace)) is None:
                break
            self.strikes[str(strike.kind), struck.phase] += 1
            self._say(f"strike {self.strikes.total()}: {strike.kind}, {struck.phase}, {run.steps_reported()} steps")
            decisive = struck if struck.is_decisive else None
        code = _wait(run)
        self.exit_codes[code] += 1
        return code, decisive

    def reference(self, recipe: Recipe) -> tuple[WatchedRun, Pace]:
        """The recipe's uninterrupted run, made when it is first asked for, and how long its parts took."""
        if recipe.name not in self._references:
            run = WatchedRun(self.folder / recipe.name.replace(", ", "-").replace(" ", ""), recipe, self._data)
            run.start()
            try:
                strikes.until(run.has_begun, run)
                begun = time.monotonic()
                strikes.until(lambda: run.steps_reported() == recipe.steps, run)
                last = time.monotonic()
                _check(run, run, _wait(run), None)
            finally:
                run.kill()
            pace = Pace(begun - run.started, (last - begun) / recipe.steps, time.monotonic() - last)
            self._references[recipe.name] = run, pace
            self._say(f"reference ({recipe.name}): {recipe.steps} steps, {time.monotonic() - run.started:.0f} s")
        return self._references[recipe.name]

    def _say(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        self.say(f"{minutes:3d}:{seconds:02d}  {line}")


def _wait(run: WatchedRun) -> int:
    """The exit code. Raises Fault for a run that does not end."""
    try:
        return run.process.wait(strikes.WAIT_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"no end within {strikes.WAIT_S:.0f} s") from None


def _check(run: WatchedRun, reference: WatchedRun, code: int, decisive: Struck | None) -> None:
    """What must hold after every life."""
    if decisive is not None:
        found = decisive.faults(run, code)
    else:
        found = [] if code == strikes.DONE else [f"exit code {code} of a run that nothing was to end"]
    if found := [*found, *run.leftovers(), *compare.faults_so_far(run, reference)]:
        after = f"after {decisive.strike.kind} while {decisive.phase}" if decisive else "after its end"
        raise Fault(f"{after}, exit code {code}:\n  " + "\n  ".join(found))


def _compare(run: WatchedRun, reference: WatchedRun) -> None:
    """What must hold when a run is done."""
    found = [f"differs from {reference.path}: {each}" for each in compare.differences(run, reference)]
    if found := [*found, *(f"a temporary file is left: {path}" for path in run.temporary_files())]:
        raise Fault("\n  ".join(found))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20, help="then the last run is left alone and compared")
    parser.add_argument("--seed", type=int, help="of the strikes (default: random)")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    folder, console = Path(tempfile.mkdtemp(prefix="soak-")), Console(width=200, highlight=False)
    console.print(f"seed {seed}, {options.minutes:g} minutes, in {folder}", markup=False)
    soak = Soak(folder, lambda line: console.print(line, markup=False))
    end, fault = time.monotonic() + 60 * options.minutes, None
    coming = itertools.takewhile(lambda _: time.monotonic() < end, strikes.drawn(seed, WORLD))
    recipes = itertools.cycle(RECIPES)
    try:
        while time.monotonic() < end:
            soak.run(next(recipes), coming)
    except Fault as found:
        fault = found
    console.print(soak.table())
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(soak.exit_codes.items()))
    console.print(f"{soak.num_runs} runs, {soak.strikes.total()} strikes, exit codes {codes}")
    if fault is not None:
        console.print(f"FAULT {fault}\nthe files are kept in {folder}; again: make soak SEED={seed}", markup=False)
        return 1
    console.print("0 differences, nothing left behind")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

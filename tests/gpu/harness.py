"""What the GPU runs share: checks one after the other in a process beside this one, a JSON file, a table.

A run is a list of checks. A check is a function that yields lines: what was found, beside what it must be (a limit),
what is hoped for (a target) or what others measured (an anchor). Limits decide; targets and anchors are only shown. The
checks share one worker process, which is replaced after a check that failed, crashed or took too long, since a GPU's
fault outlives the call that caused it. The JSON file is rewritten after every line, so a kill loses nothing.

``--rehearse`` hides the GPUs and runs every check at a small size on the CPU: against typos, without a claim.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Value = float | int | str | bool | None
Status = Literal["waiting", "running", "passed", "failed", "absent", "refused", "skipped"]
PASSED, FAILED, NO_GPU = 0, 1, 2
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
GRACE_S = 60.0  # beyond three times what a check should take, for compilers and a cold disk


class Absent(Exception):
    """A tool or package that a check wants is not on this machine: told, and no failure."""


@dataclass(frozen=True)
class Line:
    """One number. ``ok`` is None where nothing is judged; only a False of ``limit`` or ``equal`` fails the check."""

    what: str
    found: Value
    unit: str = ""
    expected: Value = None
    kind: Literal["fact", "limit", "equal", "target", "anchor"] = "fact"
    ok: bool | None = None

    @property
    def ratio(self) -> float | None:
        found, other = self.found, self.expected
        if self.kind == "equal" or not isinstance(found, int | float) or not isinstance(other, int | float):
            return None
        return found / other if other else None


def fact(what: str, found: Value, unit: str = "") -> Line:
    return Line(what, _json(found), unit)


def limit(what: str, found: float, most: float, unit: str = "") -> Line:
    """``found`` must be at most ``most``; NaN is not."""
    return Line(what, _json(found), unit, _json(most), "limit", bool(found <= most))


def equal(what: str, found: Value, expected: Value) -> Line:
    return Line(what, found, "", expected, "equal", found == expected)


def target(what: str, found: float, goal: float, unit: str) -> Line:
    """``found`` should be at most ``goal``: a goal of ours, missed or met."""
    return Line(what, _json(found), unit, goal, "target", bool(found <= goal))


def anchor(what: str, found: float, other: float, unit: str) -> Line:
    """``found`` beside a figure of somebody else, or of the planner."""
    return Line(what, _json(found), unit, other, "anchor")


def _json(value: Value) -> Value:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Here:
    """Where a check runs."""

    rehearse: bool
    folder: Path  # for files, removed after the run

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def size(self, full: T, small: T) -> T:
        """``full`` on a GPU, ``small`` in a rehearsal."""
        return small if self.rehearse else full

    def claim(self, line: Line) -> Line:
        """A line that only a GPU can be judged by: without one a mere fact."""
        return fact(line.what, line.found, line.unit) if self.rehearse else line


@dataclass(frozen=True)
class Check:
    """``function`` is ``package.module:name`` of a ``Callable[[Here], Iterator[Line]]``, imported by the worker only.

    ``seconds`` is what it should take on a GPU; with less time left it is skipped, with three times as much it is
    killed. Unless the checks named in ``after`` have passed it is refused: no speed without correctness.
    """

    name: str
    function: str
    seconds: float
    after: tuple[str, ...] = ()

    def resolve(self) -> Callable[[Here], Iterator[Line]]:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass
class Record:
    name: str
    status: Status = "waiting"
    seconds: float = 0.0
    lines: list[Line] = field(default_factory=list)
    error: str | None = None


@dataclass
class Report:
    """What the JSON file holds."""

    run: str
    rehearsal: bool
    started: str
    commit: str | None
    checks: list[Record]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(record.status in ("passed", "absent") for record in self.checks)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self) | {"passed": self.passed}, indent=1, allow_nan=False) + "\n")
        part.replace(path)


def main(run: str, checks: Sequence[Check], arguments: list[str] | None = None) -> int:
    """The command line of a run. Exit codes: 0 every check passed, 1 not, 2 no GPU and no ``--rehearse``."""
    options = _parser(run, checks).parse_args(arguments)
    if options.worker is not None:
        _work(checks, Connection(options.worker), Here(options.rehearse, options.folder))
        return PASSED
    if unknown := set(options.only) - {check.name for check in checks}:
        print(
            f"--only: no such checks: {sorted(unknown)}; there are {[check.name for check in checks]}", file=sys.stderr
        )
        return NO_GPU
    if not options.rehearse and not _has_gpu():
        print(
            f"{run}: torch sees no GPU here. Run it where there is one (tests/gpu/README.md), or try everything at a "
            "small size on the CPU with --rehearse",
            file=sys.stderr,
        )
        return NO_GPU
    out = options.out or Path("runs/gpu") / f"{run}{'-rehearsal' if options.rehearse else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = [check for check in checks if not options.only or check.name in _with_earlier(checks, options.only)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # so that the worker ends with us
    report = _run(
        run,
        chosen,
        rehearse=options.rehearse,
        out=out,
        budget_s=60 * options.minutes,
        commit=options.commit or _commit(),
    )
    print(table(report))
    print(f"\n{verdict(report)}; {out} written")
    return PASSED if report.passed else FAILED


def _parser(run: str, checks: Sequence[Check]) -> argparse.ArgumentParser:
    names = ", ".join(check.name for check in checks)
    parser = argparse.ArgumentParser(prog=f"python -m tests.gpu.{run}", epilog=f"checks: {names}")
    add = parser.add_argument
    add("--rehearse", action="store_true", help="small sizes on the CPU: against typos, no claim")
    add("--out", type=Path, metavar="FILE", help=f"the JSON file (default runs/gpu/{run}.json)")
    add("--minutes", type=float, default=9.0, help="checks that no longer fit are skipped (default 9)")
    add("--only", nargs="+", default=[], metavar="CHECK", help="these checks, and what they come after")
    add("--commit", help="what ran, where git does not say")
    add("--worker", type=int, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _with_earlier(checks: Sequence[Check], names: Sequence[str]) -> set[str]:
    """The named checks and those that must pass before them."""
    return {*names, *(other for check in checks if check.name in names for other in check.after)}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(
    run: str, checks: Sequence[Check], *, rehearse: bool, out: Path, budget_s: float, commit: str | None
) -> Report:
    start = time.monotonic()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    report = Report(run, rehearse, started, commit, [Record(check.name) for check in checks])
    folder, log = Path(tempfile.mkdtemp(prefix="gpu-run-")), out.with_suffix(".log")
    log.write_bytes(b"")
    worker: _Worker | None = None

    def save() -> None:
        report.seconds = time.monotonic() - start
        report.write(out)

    try:
        for check, record in zip(checks, report.checks, strict=True):
            left = budget_s - (time.monotonic() - start)
            needed = 0.0 if rehearse else check.seconds
            before = [other for other in report.checks if other.name in check.after]
            wanting = [other.name for other in before if other.status not in ("passed", "absent")]
            if wanting:
                record.status, record.error = "refused", f"not passed: {', '.join(wanting)}"
            elif left <= needed:
                record.status, record.error = "skipped", f"{left:.0f} s were left, {needed:.0f} needed"
            else:
                worker = worker or _Worker(rehearse, folder, log)
                worker.run(record, min(left, 3 * check.seconds + GRACE_S), save)
                if record.status == "failed":
                    worker.end()
                    worker = None
            save()
            print(f"{time.monotonic() - start:5.0f} s  {record.status:8} {check.name}", flush=True)
    finally:
        if worker is not None:
            worker.end()
        shutil.rmtree(folder, ignore_errors=True)
    return report


class _Worker:
    """The process that runs checks by name. Its output goes to the log."""

    def __init__(self, rehearse: bool, folder: Path, log: Path) -> None:
        self.log = log
        self.connection, other = Pipe()
        spec = sys.modules["__main__"].__spec__
        assert spec is not None, "a run is started with python -m"
        command = [sys.executable, "-m", spec.name, "--worker", str(other.fileno()), "--folder", str(folder)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning"}
        if rehearse:
            command.append("--rehearse")
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # too small for more threads
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        other.close()

    def run(self, record: Record, limit_s: float, save: Callable[[], None]) -> None:
        """Have the check run; its lines are in the record, and saved, as they come."""
        start, record.status = time.monotonic(), "running"
        try:
            self.connection.send(record.name)
            while record.status == "running":
                if not self.connection.poll(max(0.0, start + limit_s - time.monotonic())):
                    record.status, record.error = "failed", f"killed after {limit_s:.0f} s\n{self._tail()}"
                    break
                message: Any = self.connection.recv()
                if isinstance(message, Line):
                    record.lines.append(message)
                    save()
                else:
                    record.status, record.error = message
        except (EOFError, OSError):
            code = self.process.wait()
            record.status, record.error = "failed", f"the process ended with code {code}\n{self._tail()}"
        record.seconds = time.monotonic() - start

    def end(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it started
        self.process.wait()

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def _work(checks: Sequence[Check], connection: Connection, here: Here) -> None:
    """In the worker: run the checks whose names arrive, until nobody is at the other end; then end at once (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    by_name = {check.name: check for check in checks}
    while True:
        try:
            check = by_name[connection.recv()]
        except EOFError:
            return
        print(f"\n=== {check.name}", flush=True)
        connection.send(_outcome(check, connection, here))
        gc.collect()
        if not here.rehearse:
            import torch

            torch.cuda.empty_cache()


def _outcome(check: Check, connection: Connection, here: Here) -> tuple[Status, str | None]:
    wrong = []
    try:
        for line in check.resolve()(here):
            print(_row(line, here.rehearse), flush=True)
            connection.send(line)
            if line.ok is False and line.kind in ("limit", "equal"):
                wrong.append(line.what)
    except Absent as error:
        return "absent", str(error)
    except Exception:
        print(traceback.format_exc(), flush=True)
        return "failed", traceback.format_exc()
    return ("failed", f"wrong: {'; '.join(wrong)}") if wrong else ("passed", None)


def table(report: Report) -> str:
    """Check by check: found, expected, ratio, ok."""
    lines = [f"\n{report.run}, {report.seconds:.0f} s" + (": rehearsal: no claim" if report.rehearsal else "")]
    lines.append(f"{'':58}{'found':>14}{'expected':>14}{'ratio':>8}  ok")
    for record in report.checks:
        lines.append(f"{record.name} ({record.status}, {record.seconds:.0f} s)")
        lines += [_row(line, report.rehearsal) for line in record.lines]
        if record.error:
            lines.append("    " + record.error.strip().splitlines()[-1][:200])
    return "\n".join(lines)


def _row(line: Line, rehearsal: bool) -> str:
    """What belongs to a GPU alone is not shown beside a rehearsal's figures."""
    shown = not (rehearsal and line.kind in ("target", "anchor"))
    sign = {"limit": "<= ", "target": "aim ", "anchor": "vs "}.get(line.kind, "")
    word = {"target": ("missed", "met")}.get(line.kind, ("NO", "yes"))[bool(line.ok)]
    expected = sign + _text(line.expected) if shown and line.expected is not None else ""
    ratio = f"{line.ratio:.2f}" if shown and line.ratio is not None else ""
    name = f"  {line.what}" + (f", {line.unit}" if line.unit else "")
    judged = word if shown and line.ok is not None else ""
    return f"{name:58}{_text(line.found):>14}{expected:>14}{ratio:>8}  {judged}".rstrip()


def _text(value: Value) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


def verdict(report: Report) -> str:
    counts = {
        status: [r.name for r in report.checks if r.status == status] for status in ("failed", "refused", "skipped")
    }
    troubles = [f"{len(names)} {status} ({', '.join(names)})" for status, names in counts.items() if names]
    missed = sum(line.ok is False and line.kind == "target" for record in report.checks for line in record.lines)
    if missed and not report.rehearsal:
        troubles.append(f"{missed} targets missed")
    done = sum(record.status == "passed" for record in report.checks)
    return ", ".join([f"{done} of {len(report.checks)} checks passed", *troubles])


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None

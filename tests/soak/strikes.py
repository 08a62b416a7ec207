"""What is done to a run: whom a strike hits, with which signals, when, and how the run must then end."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from tests.soak.watched_run import SAVING, WatchedRun, catches

DONE, REQUEUE, NO_PROGRESS, HUNG, INTERRUPTED = 0, 75, 76, 77, 130  # exit codes, as README's table has them
KILLED, STOPPED, CONTINUED = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
RANK, RANKS, LAUNCHER, WORKER, ALL = "a rank", "all ranks", "launcher", "reward worker", "all processes"
AIMS = (  # moments: somewhere in the start, a step or the end, or as soon as a save gets there
    *("start", "start", "step", "step", "step", "step", "end"),
    *(f"save: {part}" for part in SAVING),
)
_OF_THE_PROGRAM = {signal.SIGINT: signal.SIGUSR1}  # Python itself has a handler for the first
WAIT_S = 900.0  # for a moment, or a victim, that should come
T = TypeVar("T")


class Fault(Exception):
    """Something that the project promises not to happen has happened."""


@dataclass(frozen=True)
class Kind:
    """``signals`` are sent to the ``victim`` one after the other. ``codes``: how the run may then end, besides DONE for
    one that was over already; none for what it must survive."""

    victim: str
    signals: tuple[signal.Signals, ...]
    codes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.victim} {' '.join(each.name for each in self.signals)}"


ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
KINDS = (
    Kind(RANK, (KILLED,), (128 + KILLED,)),
    Kind(RANK, (STOPPED, KILLED), (128 + KILLED,)),
    Kind(RANK, (STOPPED, CONTINUED), ()),
    Kind(RANK, (STOPPED,), (HUNG,)),
    Kind(RANK, (signal.SIGTERM,), (REQUEUE,)),
    Kind(RANKS, (KILLED,), (128 + KILLED,)),
    Kind(WORKER, (KILLED,), ()),
    Kind(WORKER, (STOPPED, KILLED), ()),
    Kind(LAUNCHER, (KILLED,), (-KILLED,)),
    Kind(LAUNCHER, (STOPPED, KILLED), (-KILLED,)),
    Kind(LAUNCHER, (STOPPED, CONTINUED), ()),
    Kind(LAUNCHER, (signal.SIGQUIT,), (-signal.SIGQUIT,)),
    *(Kind(LAUNCHER, (number,), (REQUEUE,)) for number in ASKING),
    Kind(LAUNCHER, (signal.SIGINT, signal.SIGINT), (INTERRUPTED, REQUEUE)),
    Kind(ALL, (signal.SIGTERM,), (REQUEUE,)),
)


@dataclass(frozen=True)
class Strike:
    """``fraction`` of the aim's usual length is waited (of ten milliseconds in a save) and, of a second, between two
    signals. ``steps``: how many of this life must be over before."""

    kind: Kind
    aim: str
    fraction: float
    rank: int
    steps: int


def drawn(seed: int, world: int) -> Iterator[Strike]:
    """Strikes without end. Every kind and every aim comes once before any comes again."""
    source = random.Random(seed)
    kinds, aims = _dealt(source, KINDS), _dealt(source, AIMS)
    while True:
        yield Strike(next(kinds), next(aims), source.random(), source.randrange(world), source.randrange(3))


@dataclass
class Pace:
    """Seconds that a life needs until its loop, for a step, and after the last step; the latest that were seen."""

    start_s: float
    step_s: float
    end_s: float


@dataclass(frozen=True)
class Struck:
    """A strike that was made. ``phase``: one of PHASES. ``heard``: the rank that was struck, or else the launcher, had
    a handler for the first signal: before, it dies of it like any program."""

    strike: Strike
    phase: str
    heard: bool

    @property
    def is_decisive(self) -> bool:
        """Whether the run is to end by it. A rank that is asked to stop before it listens goes on."""
        kind = self.strike.kind
        return bool(kind.codes) and not (kind.victim == RANK and kind.signals[0] in ASKING and not self.heard)

    def faults(self, run: WatchedRun, code: int) -> list[str]:
        """What is wrong with how the run ended: its exit code, or what it said."""
        kind, output = self.strike.kind, run.output()
        first, asked = kind.signals[0], REQUEUE in kind.codes
        if kind.victim in (LAUNCHER, ALL) and not self.heard and code == -first:
            return []
        found = ["a traceback, though it was only asked to stop"] if asked and "Traceback" in output else []
        if code == DONE:  # it was over before; what it has written is compared
            return found
        expected = [*kind.codes, *([NO_PROGRESS] if asked else [])]
        if first == signal.SIGINT and self.phase == "starting":
            expected.append(INTERRUPTED)  # no rank was there yet
        if code not in expected:
            found.append(f"exit code {code}, expected {' or '.join(map(str, kind.codes))}")
        named = re.findall(r"^ranks: rank (\d+)", output, re.MULTILINE)
        if kind.victim == RANK and not asked and named[:1] != [str(self.strike.rank)]:
            found.append(f"struck: rank {self.strike.rank}; named: {', '.join(named) or 'none'}")
        if kind.victim == RANKS and not named:
            found.append("no rank was named")
        if kind.victim == LAUNCHER and asked and self.phase != "starting" and f"{first.name}: " not in output:
            found.append(f"{first.name} was not answered")
        return found


def make(strike: Strike, run: WatchedRun, pace: Pace) -> Struck | None:
    """Wait for the moment, send the signals. None if the run ended before."""
    if not _approach(strike, run, pace) or not (victims := _victims(strike, run)):
        return None
    first, *others = strike.kind.signals
    heard = catches(victims[0] if strike.kind.victim == RANK else run.process.pid, _OF_THE_PROGRAM.get(first, first))
    run.note_shared_memory()
    in_save = strike.aim.startswith("save")
    if in_save and not _wait_for_save(strike, run):
        return None
    phase = "" if in_save else run.phase()
    if not _send(first, victims):
        return None
    if in_save:  # looked at afterwards: a save gets on in a millisecond
        phase = f"save: {part}" if (part := run.saving()) else "after a save"
    for number in others:
        time.sleep(strike.fraction)
        _send(number, victims)
    return Struck(strike, phase, heard)


def _approach(strike: Strike, run: WatchedRun, pace: Pace) -> bool:
    """Wait for the start's part, the step or the end that the strike is for; False if the run ends before."""
    if strike.aim == "start":
        return until(lambda: time.monotonic() > run.started + strike.fraction * pace.start_s, run)
    if not until(run.has_begun, run):
        return False
    pace.start_s = min(pace.start_s, time.monotonic() - run.started)  # the machine may be less busy than before
    steps = run.recipe.steps
    if strike.aim != "end":
        steps = min(run.steps_saved() + strike.steps, steps - 1)
    if not until(lambda: run.steps_reported() >= steps, run):
        return False
    if not strike.aim.startswith("save"):
        time.sleep(strike.fraction * (pace.end_s if strike.aim == "end" else pace.step_s))
    return True


def _wait_for_save(strike: Strike, run: WatchedRun) -> bool:
    part = strike.aim.removeprefix("save: ")
    if not until(lambda: run.saving() == part, run, poll_s=0.0005):
        return False
    time.sleep(0.01 * strike.fraction if part == "shards" else 0)
    return True


def until(condition: Callable[[], bool], run: WatchedRun, *, poll_s: float = 0.005) -> bool:
    """Wait for a condition; False if the run ends before. Raises Fault if neither comes within WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if run.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise Fault(f"the run has been at the same step for {WAIT_S:.0f} s")
        time.sleep(poll_s)
    return True


def _victims(strike: Strike, run: WatchedRun) -> list[int]:
    """Their pids, as soon as there are any; empty if the run ends before."""
    found: list[int] = []

    def look() -> bool:
        ranks = run.ranks()
        found[:] = {
            RANK: [ranks[strike.rank]] if strike.rank in ranks else [],
            RANKS: list(ranks.values()),
            LAUNCHER: [run.process.pid],
            WORKER: run.workers()[strike.rank :][:1],
            ALL: run.processes(),
        }[strike.kind.victim]
        return bool(found)

    return found if until(look, run) else []


def _send(number: signal.Signals, pids: Sequence[int]) -> int:
    """How many there were to receive it."""
    sent = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            sent += 1
    return sent


def _dealt(source: random.Random, cards: Sequence[T]) -> Iterator[T]:
    while True:
        yield from source.sample(cards, len(cards))

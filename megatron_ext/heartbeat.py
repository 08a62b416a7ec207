"""How a rank tells its launcher that it lives, what it does, and where it stands when it hangs.

Every rank has a slot of a file that its launcher (tools/ranks.py) shares with it and reads. Two things are told apart:

- it answers: a thread beats once a second. It cannot where no thread can: the process is stopped, or one of its calls
  neither returns nor lets other Python threads run (a device or a file system that never answers, a C call that holds
  the interpreter's lock).
- it gets on: the main thread counts its signs of progress (phases entered and left, micro-batches, tokens, answers)
  and says which step and phase it is in. With each beat goes whether it waits for other ranks, itself or in a thread
  that it waits for, so that nobody is blamed for a rank that he waits for.

When asked, a rank writes the Python stacks of all its threads to another file of the launcher's. It is asked by SIGNAL,
whose answer is C code's and so comes from within a call that never returns too; then, for a main thread that the kernel
does not let answer, through its slot, where the thread that beats looks. Without such a launcher all of this does
nothing. No torch is imported.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

SLOTS, STACKS = "RANKS_HEARTBEAT_FD", "RANKS_STACKS_FD"  # the files' descriptors, in a rank's environment
SIGNAL = signal.SIGUSR2
BEAT_S = 1.0
START, END, BETWEEN = "start", "end", "between two phases"
LONG = (START, END, "save")  # phases in which a whole model is read or written, an engine compiled
LONG_S = 3600.0  # without progress in them, unless the run allows more everywhere
SILENCE_S, LONG_SILENCE_S = 45, 300  # without a beat; long: libraries are loaded under the interpreter's lock
_WAITING_IN = tuple(  # code of which a blocked main thread waits for other ranks
    path.replace("/", os.sep)
    for path in ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline_parallel/p2p_")
)
_BEAT = struct.Struct("=2q")  # beats, whether the main thread waits for others; written by the thread
_PLACE = struct.Struct("=4q32s")  # signs of progress, silence and deadline in seconds, step, phase; by the main thread
_COUNT = struct.Struct("=q")  # the first of _PLACE
_ASKED = struct.Struct("=q")  # whether the launcher asks for stacks
_PLACE_AT, _ASKED_AT, _SIZE = _BEAT.size, _BEAT.size + _PLACE.size, _BEAT.size + _PLACE.size + _ASKED.size


class Pulse(NamedTuple):
    """What a rank has told. ``beats`` 0: nothing yet. ``deadline_s``: to the next sign of progress; 0: none."""

    beats: int
    is_waiting: bool
    progress: int
    silence_s: int
    deadline_s: int
    step: int
    phase: str

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class Slots:
    """The slots of a node's ranks, for their launcher. ``file``: one that they inherit."""

    def __init__(self, file: IO[bytes], num_ranks: int) -> None:
        file.truncate(num_ranks * _SIZE)
        self._map = mmap.mmap(file.fileno(), num_ranks * _SIZE)

    def read(self, local_rank: int) -> Pulse:
        beats, waits = _BEAT.unpack_from(self._map, local_rank * _SIZE)
        progress, silence_s, deadline_s, step, phase = _PLACE.unpack_from(self._map, local_rank * _SIZE + _PLACE_AT)
        name = phase.rstrip(b"\0").decode(errors="replace")
        return Pulse(beats, bool(waits), progress, silence_s, deadline_s, step, name)

    def ask(self, local_rank: int) -> None:
        """For its stacks, which it writes within a beat, if its thread runs."""
        _put(self._map, local_rank * _SIZE + _ASKED_AT, _ASKED.pack(1))


class _Heartbeat:
    """Of this process, a rank."""

    def __init__(self, slots: int, local_rank: int, stacks: int, hang_s: float) -> None:
        self._map, self._slot, self._stacks = mmap.mmap(slots, 0), local_rank * _SIZE, stacks
        self._hang_s, self._progress, self._step, self._phase = hang_s, 0, 0, START
        self.enter(START)
        faulthandler.register(SIGNAL, file=stacks, all_threads=True)
        threading.Thread(target=self._beat_on, name="heartbeat", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> str:
        """Returns the phase that is left."""
        before, self._phase = self._phase, phase
        self._step = self._step if step is None else step
        self._progress += 1
        is_long = phase in LONG
        deadline_s = max(self._hang_s, LONG_S) if is_long and self._hang_s else self._hang_s
        silence_s = LONG_SILENCE_S if phase in (START, END) else SILENCE_S
        place = (self._progress, silence_s, math.ceil(deadline_s), self._step, phase.encode()[:32])
        _put(self._map, self._slot + _PLACE_AT, _PLACE.pack(*place))
        return before

    def progress(self) -> None:
        self._progress += 1
        _put(self._map, self._slot + _PLACE_AT, _COUNT.pack(self._progress))

    def _beat_on(self) -> None:
        main, beats = threading.main_thread().ident, 0
        assert main is not None
        while True:
            beats += 1
            _put(self._map, self._slot, _BEAT.pack(beats, _waits(main)))
            if _ASKED.unpack_from(self._map, self._slot + _ASKED_AT)[0]:
                _put(self._map, self._slot + _ASKED_AT, _ASKED.pack(0))
                faulthandler.dump_traceback(self._stacks, all_threads=True)
            time.sleep(BEAT_S)


def _put(slots: mmap.mmap, at: int, content: bytes) -> None:
    """For a reader who may look meanwhile: it sees old numbers or new ones. ``pack_into`` would show it zeros first."""
    slots[at : at + len(content)] = content


def _waits(thread: int) -> bool:
    while (other := _waited_for.get(thread)) is not None:
        thread = other
    frame = sys._current_frames().get(thread)
    return frame is not None and any(path in frame.f_code.co_filename for path in _WAITING_IN)


_own: _Heartbeat | None = None
_waited_for: dict[int, int] = {}  # a thread -> the one of this process that it waits for


def begin(hang_s: float) -> None:
    """Report to the launcher from now on, as long as this process lives. ``hang_s`` without progress end the run."""
    global _own
    if SLOTS in os.environ:
        slots, rank, stacks = (int(os.environ[name]) for name in (SLOTS, "LOCAL_RANK", STACKS))
        _own = _Heartbeat(slots, rank, stacks, hang_s)


def enter(phase: str, *, step: int) -> None:
    """From now on this rank is in ``phase`` of ``step``; 0: outside of all steps."""
    if _own is not None:
        _own.enter(phase, step)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the step."""
    if _own is None:
        yield
        return
    before = _own.enter(name)
    try:
        yield
    finally:
        _own.enter(before)


@contextmanager
def waiting_for(thread: threading.Thread) -> Iterator[None]:
    """This thread waits for another one, which has been started: where that one waits for other ranks, so does this."""
    assert thread.ident is not None
    _waited_for[threading.get_ident()] = thread.ident
    try:
        yield
    finally:
        del _waited_for[threading.get_ident()]


def progress() -> None:
    """A sign of progress: at least one in every ``train.hang_minutes`` of work. From any thread."""
    if _own is not None:
        _own.progress()

"""Which rank of this node hangs, by what the ranks tell (megatron_ext/heartbeat.py).

A rank hangs when it has not answered for STOPPED_S while it is stopped (SIGSTOP), for its own ``silence_s`` otherwise;
or when it has worked for its ``deadline_s`` without a sign of progress. The time that it waits for other ranks is not
counted: whoever they wait for is blamed, on his node. Where all ranks of a run wait, and none has shown progress for as
long, they wait for each other. Several nodes cannot see that of each other: there torch's timeouts end such a wait.

While the launcher itself is stopped, as by Ctrl-Z, no time is counted, and none for a rank at a debugger's breakpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_ext import heartbeat
from megatron_ext.heartbeat import Pulse

STOPPED_S = 30.0
LOOK_S = 1.0  # that the time since the last look can count
STACKS_S = 5.0  # to write one's stacks, each way of being asked


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen
    stacks: IO[bytes]
    pulse: Pulse
    state: str = ""  # the kernel's letter for what the process does: R, S, D, T (stopped), t (by a debugger) ...
    silent: float = 0.0  # seconds of looks without a beat
    worked: float = 0.0  # without progress, not counting those in which it waited for others
    still: float = 0.0  # without progress

    def __str__(self) -> str:
        return f"rank {self.number} (process {self.process.pid})"

    @property
    def place(self) -> str:
        return f" in {self.pulse.place}" if self.pulse.beats else ""

    @property
    def is_mute(self) -> bool:
        return self.silent > (STOPPED_S if self.state == "T" else self.pulse.silence_s)

    @property
    def is_stuck(self) -> bool:
        return 0 < self.pulse.deadline_s < self.worked

    @property
    def waits_too_long(self) -> bool:
        return self.pulse.is_waiting and 0 < self.pulse.deadline_s < self.still

    @property
    def num_written(self) -> int:
        """Bytes of its stacks."""
        return os.fstat(self.stacks.fileno()).st_size

    def look(self, pulse: Pulse, passed_s: float) -> None:
        self.state = _state(self.process.pid)
        if self.state == "t":
            return
        answers = self.state != "T" and (pulse.beats != self.pulse.beats or not pulse.beats)
        self.silent = 0.0 if answers else self.silent + passed_s
        if pulse.progress != self.pulse.progress:
            self.worked = self.still = 0.0
        self.still += passed_s
        self.worked += 0.0 if pulse.is_waiting else passed_s
        self.pulse = pulse


class Watchdog:
    """Of a node's ranks, numbered from ``first``. ``alone``: the run has no others."""

    def __init__(
        self,
        processes: Sequence[subprocess.Popen],
        slots: heartbeat.Slots,
        stacks: Sequence[IO[bytes]],
        *,
        first: int,
        alone: bool,
    ) -> None:
        self._slots, self._alone, self._last = slots, alone, time.monotonic()
        self.ranks = [
            _Rank(first + index, process, file, slots.read(index))
            for index, (process, file) in enumerate(zip(processes, stacks, strict=True))
        ]

    def place(self, index: int) -> str:
        """Where a rank was when it last told: `` in update of step 3``, or nothing."""
        self.ranks[index].pulse = self._slots.read(index)
        return self.ranks[index].place

    def look(self) -> list[int]:
        """The ranks that hang; called again and again."""
        now = time.monotonic()
        passed_s, self._last = min(now - self._last, LOOK_S), now
        alive = [(index, rank) for index, rank in enumerate(self.ranks) if rank.process.poll() is None]
        for index, rank in alive:
            rank.look(self._slots.read(index), passed_s)
        if alive and self._alone and all(rank.waits_too_long for _, rank in alive):
            return [index for index, _ in alive]
        return [index for index, rank in alive if rank.is_mute or rank.is_stuck]

    def report(self, hung: Sequence[int]) -> str:
        """What each rank does, those that hang first, with their Python stacks."""
        lines = [f"ranks: {rank}{rank.place} {_fault(rank)}" for rank in (self.ranks[index] for index in hung)]
        lines.append("ranks: the run ends here; run the same command again, and it goes on from its last checkpoint")
        alive = [rank for index, rank in enumerate(self.ranks) if index not in hung and rank.process.poll() is None]
        for rank in alive:
            does = "waits for other ranks" if rank.pulse.is_waiting else "works"
            lines.append(f"ranks: {rank}{rank.place} {does}, last sign of progress {rank.still:.0f} s ago")
        shown = [self.ranks[index] for index in hung] + alive
        self._ask_for_stacks([rank for rank in shown if rank.pulse.beats])  # others do not know the signal
        for rank in shown:
            stacks = os.pread(rank.stacks.fileno(), rank.num_written, 0).decode(errors="replace")
            lines.append(f"ranks: {rank}: {'its Python stacks' if stacks else 'does not tell its Python stacks'}")
            lines += [f"    {line}" for line in stacks.splitlines()]
        return "\n".join(lines)

    def _ask_for_stacks(self, ranks: Sequence[_Rank]) -> None:
        for rank in ranks:
            rank.process.send_signal(heartbeat.SIGNAL)
            if rank.state == "T":  # it must go on to answer
                rank.process.send_signal(signal.SIGCONT)
                _wait_for_stacks([rank])
                rank.process.send_signal(signal.SIGSTOP)
        _wait_for_stacks(ranks)
        for rank in ranks:
            if not rank.num_written:
                self._slots.ask(self.ranks.index(rank))
        _wait_for_stacks(ranks)


def _fault(rank: _Rank) -> str:
    if rank.state == "T" and rank.is_mute:
        return f"has been stopped for {rank.silent:.0f} s (SIGSTOP), and the others wait for it"
    if rank.is_mute and rank.state == "D":
        return f"has not answered for {rank.silent:.0f} s: it waits for a device or a file system{_kernel(rank)}"
    if rank.is_mute:
        return f"has not answered for {rank.silent:.0f} s: one of its calls lets no other Python thread run"
    if rank.is_stuck:
        return f"has worked for {rank.worked:.0f} s without a sign of progress"
    return f"has waited for {rank.still:.0f} s for ranks that all wait"


def _kernel(rank: _Rank) -> str:
    try:
        where = Path(f"/proc/{rank.process.pid}/wchan").read_text()
    except OSError:
        return ""
    return f" (in the kernel's {where})" if where.strip("0") else ""


def _wait_for_stacks(ranks: Sequence[_Rank]) -> None:
    """Until all have written theirs, and none writes any more, or STACKS_S."""
    end, before = time.monotonic() + STACKS_S, []
    while time.monotonic() < end:
        time.sleep(0.05)
        now = [rank.num_written for rank in ranks]
        if all(now) and now == before:
            return
        before = now


def _state(pid: int) -> str:
    """Empty where it is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""

"""Signals of a run, from its first line to its last.

SIGTERM and SIGUSR1 (what Slurm sends before the time limit) ask a rank to save and to end. While it starts there is
nothing to save that the last checkpoint does not hold: it ends at once. Both exit with 75: run the command again.
SIGINT ends a rank at once, whatever it does; its launcher (tools/ranks.py) sends it when nothing can be saved any more.

A step that fails may leave threads behind that generate, or wait for other ranks. ``leave`` ends the process all the
same, with the code of the error. No torch is imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import NoReturn

REQUEUE = 75  # exit code: stopped by a signal; the state is saved, or nothing is new
ASKING = (signal.SIGTERM, signal.SIGUSR1)
STEP_THREAD = "step: "  # how the name of a thread begins that is left behind by a step that fails


class StopSignals:
    """Answers signals from now on; the latest instance of the process does."""

    def __init__(self) -> None:
        self.received = False
        self._starting = True
        for number in ASKING:
            signal.signal(number, self._receive)

    def defer(self) -> None:
        """The run has started: a signal is from now on only noted in ``received``."""
        self._starting = False

    def _receive(self, *_: object) -> None:
        self.received = True
        if self._starting:
            for number in ASKING:  # the launcher repeats itself until this process has ended
                signal.signal(number, signal.SIG_IGN)
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"stopped while starting: nothing new to save; run the same command again\n")
            sys.exit(REQUEUE)


def heed_interrupts() -> None:
    """SIGINT raises KeyboardInterrupt, also in a child that inherited to ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_signals() -> None:
    """The exit code stands: the interpreter's end would restore the defaults, and a last signal would change it."""
    for number in (*ASKING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def leave(code: int) -> NoReturn:
    """End this process with ``code``, whatever threads a step has left behind.

    The interpreter's own end would wait for those that theirs wait for, and take the others down: within a call of
    torch's that aborts the process, which then looks like a crash.
    """
    if any(thread.name.startswith(STEP_THREAD) for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

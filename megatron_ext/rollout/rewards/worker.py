"""What a worker process of a pool (worker_pool.py) does, whatever it scores: one line in, one line out. No torch."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import TextIO

MAX_WORKER_BYTES = 2 << 30  # address space: a huge number fails alone instead of taking the node's memory
READY = "ready"
# gmpy2 computes (2^31)! in one C call and aborts the process on a number too large; python's integers do not
WORKER_ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"}


def open_replies() -> TextIO:
    """Standard output, for replies alone: what parsers and functions print goes to standard error from now on.

    Signals that a scheduler sends to all processes are for the trainer, which closes the pool when it ends.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for notice in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(notice, signal.SIG_IGN)
    return replies


def limit_memory(num_bytes: int = MAX_WORKER_BYTES) -> None:
    """The process's address space."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(
        resource.RLIMIT_AS, (num_bytes if hard == resource.RLIM_INFINITY else min(hard, num_bytes), hard)
    )


def serve(replies: TextIO, reply: Callable[[str], str]) -> None:
    """Answer each line of standard input with one, until there are no more.

    ``argv[1]``: seconds for one line after which a process that nobody killed (its parent is dead) ends itself.
    """
    print(READY, file=replies)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        answer = reply(line)
        signal.alarm(0)
        print(answer, file=replies)

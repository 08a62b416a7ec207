"""What a rank says when it ends in a fault: once a node, whatever number of its ranks find it.

A fault that all ranks find is said by the first of them. When a rank has ended in one, the others' connections to it
break; these errors are consequences, and end their ranks with the same code and in silence. What was said is kept in
an unnamed file that the launcher (tools/ranks.py) opens for its ranks; without such a launcher every rank speaks.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from typing import IO

FILE = "RANKS_FAULTS_FD"  # the file's descriptor, in a rank's environment


def shared_file() -> IO[bytes]:
    """For the launcher: a file for its ranks to inherit."""
    return tempfile.TemporaryFile()


def reason(code: int) -> int:
    """The exit code of the first rank of this node that had a reason to end, which is ``code`` if no other has."""
    first = _first(code)
    return code if first is None else first


def report(code: int, message: str) -> int:
    """Say ``message`` unless another rank of this node has said something; the exit code to end with."""
    first = _first(code)
    if first is None:
        print(message, file=sys.stderr, flush=True)
        return code
    return first


def consequence() -> int | None:
    """The exit code of the rank of this node whose fault has been said, if any."""
    return _code(int(os.environ[FILE])) if FILE in os.environ else None


def claim(file: int, code: int) -> int | None:
    """None for the first to claim ``file``, a descriptor, whose ``code`` is kept; that code for the others."""
    fcntl.lockf(file, fcntl.LOCK_EX)  # of the process, though all share the descriptor's file
    try:
        first = _code(file)
        if first is None:
            os.pwrite(file, b"%d" % code, 0)
        return first
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN)


def _first(code: int) -> int | None:
    return claim(int(os.environ[FILE]), code) if FILE in os.environ else None


def _code(file: int) -> int | None:
    said = os.pread(file, 10, 0)
    return int(said) if said else None

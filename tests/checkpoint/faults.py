"""Cut an action short at every file operation it makes: SIGKILL, or a disk that is full from there on."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_FREES_SPACE = {"os.remove", "os.rmdir", "shutil.rmtree"}


def on_event(root: Path, react: Callable[[str], None]) -> None:
    """Call ``react(operation)`` before each operation below ``root`` and each fsync. For a child: never undone."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        react("fsync")
        sync(descriptor)

    def audit(event: str, args: tuple) -> None:
        if event in _CHANGES and str(args[0]).startswith(str(root)):
            reading = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if not reading:
                react(event)

    os.fsync = fsync
    sys.addaudithook(audit)


def kill_at(root: Path, index: int) -> None:
    """SIGKILL this process just before its ``index``-th operation."""
    seen = 0

    def react(operation: str) -> None:
        nonlocal seen
        seen += 1
        if seen == index:
            os.kill(os.getpid(), signal.SIGKILL)

    on_event(root, react)


def full_at(root: Path, index: int) -> None:
    """From the ``index``-th operation on, everything that needs space fails; deleting still works."""
    seen = 0

    def react(operation: str) -> None:
        nonlocal seen
        seen += operation not in _FREES_SPACE
        if seen >= index and operation not in _FREES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_event(root, react)


def fail_once(root: Path, operation: str) -> None:
    """The first ``operation`` fails as a flaky disk would; all others succeed."""
    pending = [operation]

    def react(seen: str) -> None:
        if seen in pending:
            pending.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_event(root, react)


def child(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked process: its exit code, 0 after a normal return, -9 after SIGKILL."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_everywhere(root: Path, prepare: Callable[[], object], action: Callable[[], object]) -> Iterator[int]:
    """For k = 1, 2, ...: ``prepare()``, run ``action`` in a child killed before operation k, yield k.

    Ends, without yielding, when the action outlives k operations.
    """
    index = 0
    while True:
        index += 1
        prepare()

        def run(index: int = index) -> None:
            kill_at(root, index)
            action()

        code = child(run)
        if code == 0:
            return
        assert code == -signal.SIGKILL, f"the child ended with {code} before operation {index}"
        yield index

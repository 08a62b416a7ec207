"""Who owns a run's folder: one run at a time, and how often it was stopped without getting on.

The lock is the operating system's, on the file ``.lock``: it ends with the process that holds it, however that ends,
so none is ever stale. Rank 0 holds it. One that was just killed still needs a moment to end. No torch is imported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from megatron_ext.checkpoint.manifest import TRACKER
from megatron_ext.config.errors import ConfigError
from megatron_ext.train.signals import REQUEUE

LOCK, STOPS = ".lock", "stops.json"
MAX_STOPS = 3  # in a row without a new checkpoint
NO_PROGRESS = 76  # exit code; above 75: of several nodes' codes srun returns the largest
_PATIENCE_S = 3.0  # until a folder's holder counts as one that goes on
_POLL_S = 0.1
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunFolder:
    """A context that holds the run's folder. Raises ConfigError if another run does, or if it cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = -1

    def __enter__(self) -> RunFolder:
        try:
            self._lock = self._take()
        except ConfigError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in log.dir
            raise ConfigError(f"log.dir: the run's folder {self.path} cannot be written: {error}") from None
        self._start = self._checkpoint()
        return self

    def __exit__(self, *_: object) -> None:
        (self.path / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: the run got as far as its files
            self.path.rmdir()
        os.close(self._lock)

    def exit_code(self, code: int) -> int:
        """``code``, or NO_PROGRESS where a requeue would be the next of many that get nowhere."""
        file, checkpoint = self.path / STOPS, self._checkpoint()
        if code != REQUEUE or checkpoint != self._start:
            file.unlink(missing_ok=True)
            return code
        before = json.loads(file.read_text()) if file.exists() else {}
        stops = before["stops"] + 1 if before.get("checkpoint") == checkpoint else 1  # a killed run may have saved one
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"stops": stops, "checkpoint": checkpoint}) + "\n")
        temporary.replace(file)
        if stops < MAX_STOPS:
            return code
        print(
            f"stopped {stops} times in a row before anything new was saved: not to be queued again; give the job more "
            "time than a start, a step and a save need, or find out what stops it",
            file=sys.stderr,
        )
        return NO_PROGRESS

    def _checkpoint(self) -> str:
        """The name of the last checkpoint; empty if there is none."""
        tracker = self.path / "checkpoints" / TRACKER
        return tracker.read_text(errors="replace") if tracker.is_file() else ""

    def _take(self) -> int:
        until = time.monotonic() + _PATIENCE_S
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 200).decode(errors="replace").strip()
                os.close(lock)
                if time.monotonic() < until:
                    time.sleep(_POLL_S)
                    continue
                raise ConfigError(
                    f"name: another run is at work in {self.path}: {holder or 'it has only just begun'}; wait for it, "
                    "end it, or give this run another name"
                ) from None
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                print(f"{self.path}: its file system has no locks: see to it that one run uses it", file=sys.stderr)
            if self._is_current(lock):
                break
            os.close(lock)  # its holder removed it meanwhile
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return lock

    def _is_current(self, lock: int) -> bool:
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK))
        except FileNotFoundError:
            return False

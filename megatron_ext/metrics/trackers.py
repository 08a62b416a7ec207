"""The experiment trackers that a run writes to besides its own files: each one in a process of its own.

Such a process (tracker_process.py) follows ``metrics.jsonl`` and ``samples.jsonl`` in the run's folder, at low
priority. So a tracker can neither slow nor stop the training, whatever its network, disk or library does, and what it
missed it logs when the same command is run again. ``trackers/`` in the run's folder holds for each one ``NAME.json``
(the tracker's id of the run, and the last step that it was given) and ``NAME.log`` (what its library says). No torch is
imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.redact import redact_text

FOLDER = "trackers"
PACKAGES = {  # what each one is installed as; mlflow's two write its SQLite store
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
}
FINISH_S = 30.0  # that the trackers of a run that ends have for what they did not send yet
_POLL_S = 0.05


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError naming the packages that are not installed."""
    missing = [package for name in names for package in PACKAGES[name] if not _is_installed(package)]
    if missing:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)} not installed, which {list(names)} needs; install with\n"
            f"  {sys.executable} -m pip install {' '.join(missing)}\n"
            "or leave the tracker out of log.trackers"
        )


class Trackers:
    """The trackers' processes. Nothing here raises because of a tracker: it is given up, with a line that says why.

    ``resume_step`` 0 begins a new run in every tracker, any other goes on with the run that ``NAME.json`` names.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], *, resume_step: int):
        self._folder = run_dir / FOLDER
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lines: list[str] = []
        for name in names:
            try:
                self._folder.mkdir(exist_ok=True)
                with (self._folder / f"{name}.log").open("ab") as log:
                    self._processes[name] = subprocess.Popen(
                        [sys.executable, "-m", "megatron_ext.metrics.tracker_process", run_dir, name, str(resume_step)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a group of its own, to be killed with what the library starts
                    )
            except OSError as error:
                self._lines.append(f"tracker {name} is off, it could not be started: {error}; training goes on")

    def lines(self) -> list[str]:
        """What there is to say since the last call: once for each tracker that has failed."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self._drop(name)
                self._lines.append(f"tracker {name} is off: {self._last_words(name)}; training goes on")
        lines, self._lines = self._lines, []
        return lines

    def close(self, *, failed: bool, wait_s: float) -> list[str]:
        """End the trackers' runs, in at most about ``wait_s`` seconds; returns what there is to say.

        ``failed``: the run ends with an error, which trackers that know of such an end are told.
        """
        lines = self.lines()
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended meanwhile
                process.stdin.write(b"failed\n" if failed else b"done\n")
                process.stdin.flush()
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes.values()):
            time.sleep(_POLL_S)
        for name, process in list(self._processes.items()):
            if process.poll() is None:
                hint = f"the same command again gives it the rest; {self._where(name)}"
                lines.append(f"tracker {name} did not finish within {wait_s:.0f} s; {hint}")
            elif process.returncode:
                lines.append(f"tracker {name} failed: {self._last_words(name)}")
            self._drop(name)
        return lines

    def _drop(self, name: str) -> None:
        process = self._processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()

    def _last_words(self, name: str) -> str:
        """The last line of the process' log: of a traceback, its error."""
        with contextlib.suppress(OSError):
            log = (self._folder / f"{name}.log").read_bytes()[-10_000:].decode(errors="replace").strip()
            return f"{redact_text(log.splitlines()[-1])[:300] if log else 'it has ended'} ({self._where(name)})"
        return self._where(name)

    def _where(self, name: str) -> str:
        return f"see {self._folder / f'{name}.log'}"


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True

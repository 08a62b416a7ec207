"""The real training command on the tiny model, seen from outside: its processes, where it is, what it leaves.

The program is not asked how it is. Its processes are found in /proc by their working directory, which is theirs
alone; what a step is at is read off rank 0's stack, which faulthandler writes on a signal (hook/sitecustomize.py);
how far a save is, off the names in the folder of checkpoints.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOOK = Path(__file__).parent / "hook"
WRITE_STACK = signal.SIGRTMIN + 5  # as in the hook
GONE_S = 60.0  # that other processes may take to end after the launcher: a worker that imports SymPy does it first
SMALL = (
    *("rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2", 'data.curriculum=""'),
    *("log.trackers=[]", "log.samples=1", 'log.dir="."', 'name="run"'),
)
SAVING = ("shards", "manifest", "rename", "latest", "removal")  # of a save, in this order
_PHASES = (  # the first whose file, and function of it, is on the stack
    ("loading", "setup.py", "build"),
    ("sync", "trainer.py", "sync"),
    ("reward", "worker_pool.py", "replies_to"),
    ("rollout", "collect_rollouts.py", ""),
    ("step", "step.py", ""),
    ("save: copy", "checkpoint.py", ""),
    ("metrics", "writer.py", ""),
    ("between", "loop.py", "run"),
)
PHASES = (
    *("starting", "loading", "sync", "rollout", "reward", "step", "metrics", "between", "save: copy"),
    *(f"save: {part}" for part in SAVING),
    *("after a save", "ending"),
)


@dataclass(frozen=True)
class Recipe:
    """``overrides`` come after those that make every run small."""

    name: str
    path: str
    overrides: tuple[str, ...]
    steps: int


class WatchedRun:
    """A run in ``folder/run``, started again and again; what each life says is in ``life-N.log``."""

    def __init__(self, folder: Path, recipe: Recipe, data: Path) -> None:
        self.folder, self.recipe, self.data, self.lives = folder.resolve(), recipe, data.resolve(), 0
        self.path, self.checkpoints = self.folder / "run", self.folder / "run" / "checkpoints"
        self._shared_memory: set[str] = set()
        self._old_names: frozenset[str] = frozenset()  # in the folder of checkpoints, when this life began
        for name in ("tmp", "stacks"):
            (self.folder / name).mkdir(parents=True)

    @property
    def log(self) -> Path:
        return self.folder / f"life-{self.lives:02d}.log"

    def start(self) -> None:
        """Begin the next life, with the command of the first."""
        self.lives += 1
        self._old_names = frozenset(self._names())
        self._started_ns, self.started = time.time_ns(), time.monotonic()
        settings = [*SMALL, f'data.train="{self.data}"', f"train.steps={self.recipe.steps}", *self.recipe.overrides]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.train", str(ROOT / "recipes" / self.recipe.path), *settings],
                cwd=self.folder,
                env={
                    **{name: value for name, value in os.environ.items() if name != "RANK"},
                    **{"PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                    **{"TMPDIR": str(self.folder / "tmp"), "SOAK_STACKS": str(self.folder / "stacks")},
                    "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "torch"),  # torch's own, which is to stay
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What the present life has said."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End everything that is left of the run."""
        for pid in [self.process.pid, *self.processes()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    # Its processes

    def processes(self) -> list[int]:
        """Pids of all that work in the folder, zombies left out."""
        return [pid for pid in _pids() if _link(f"{pid}/cwd") == str(self.folder) and _state(pid) != "Z"]

    def ranks(self) -> dict[int, int]:
        """Rank -> pid: the launcher's children, once they run Python."""
        numbers = {pid: _environment(pid).get("RANK") for pid in self.processes() if _parent(pid) == self.process.pid}
        return {int(rank): pid for pid, rank in numbers.items() if rank is not None}

    def workers(self) -> list[int]:
        """Pids of the reward pools' processes: children of ranks, which run the verifier."""
        ranks = set(self.ranks().values())
        return [
            pid for pid in self.processes() if _parent(pid) in ranks and "rewards.verify" in _read(f"{pid}/cmdline")
        ]

    # Where it is

    def has_begun(self) -> bool:
        """Whether this life is in its loop, before which it writes its configuration."""
        with suppress(OSError):
            return (self.path / "config.json").stat().st_mtime_ns > self._started_ns
        return False

    def steps_reported(self) -> int:
        with suppress(OSError):
            return (self.path / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def steps_saved(self) -> int:
        """The step of the checkpoint that is to be resumed from; 0 without one."""
        with suppress(OSError, ValueError):
            return int((self.checkpoints / "latest").read_text().removeprefix("step_"))
        return 0

    def saving(self) -> str | None:
        """How far a save of this life is, by the names on the disk: one of SAVING, or None."""
        names, saved = set(self._names()) - self._old_names, self.steps_saved()
        steps = {name: int(found[1]) for name in names if (found := re.match(r"step_(\d+)", name))}
        partial = [name for name, step in steps.items() if ".tmp-" in name and step > saved]
        if any(name.startswith("latest.") for name in names):
            return "latest"
        if any(step > saved for name, step in steps.items() if "." not in name):
            return "rename"
        if partial:
            return "manifest" if (self.checkpoints / partial[0] / "MANIFEST.json").exists() else "shards"
        return "removal" if any(".tmp-" in name for name in names) else None

    def phase(self) -> str:
        """What rank 0 is doing now, one of PHASES: a save on its way counts more than what goes on beside it."""
        if (part := self.saving()) is not None:
            return f"save: {part}"
        stack = self._stack()
        on_stack = [name for name, file, function in _PHASES if any(_is_of(each, file, function) for each in stack)]
        return on_stack[0] if on_stack else "ending" if self.has_begun() else "starting"

    def note_shared_memory(self) -> None:
        """Remember what is mapped of /dev/shm: none of it may stay."""
        for pid in self.processes():
            self._shared_memory |= set(re.findall(r"/dev/shm/\S+", _read(f"{pid}/maps")))

    # What it left

    def leftovers(self) -> list[str]:
        """What is still there after the launcher has ended and must not be, in words; processes get GONE_S seconds."""
        reported, deadline = self.steps_reported(), time.monotonic() + GONE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = [f"process {pid} is left: {_read(f'{pid}/cmdline').replace(chr(0), ' ')[:200]}" for pid in left]
        if (now := self.steps_reported()) != reported:
            found.append(f"the ranks went on without their launcher: {reported} steps when it ended, {now} later")
        found += [f"shared memory is left: {name}" for name in sorted(self._shared_memory) if os.path.exists(name)]
        with suppress(FileNotFoundError), (self.path / ".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append("the run's folder is still locked")
        return found

    def temporary_files(self) -> Iterator[Path]:
        """What no run has that is over: files in TMPDIR, saves that were cut, other passing names.

        Megatron imports wandb where it is installed, whose import makes two empty folders; wandb removes them in order.
        """
        for path in (self.folder / "tmp").iterdir():
            if not (path.name.endswith(("wandb-media", "wandb-artifacts")) and not any(path.iterdir())):
                yield path
        for path in self.path.rglob("*"):
            if ".tmp" in path.name or ".replaced" in path.name or path.name in (".lock", "stops.json"):
                yield path

    def _stack(self) -> list[tuple[str, str]]:
        """(file, function) of rank 0's main thread; empty if it does not listen yet, or is gone."""
        pid = self.ranks().get(0, 0)
        file = self.folder / "stacks" / str(pid)
        if not catches(pid, WRITE_STACK):
            return []
        before = size = file.stat().st_size
        with suppress(ProcessLookupError):
            os.kill(pid, WRITE_STACK)
        deadline = time.monotonic() + 1
        while (
            size == before or size < file.stat().st_size
        ) and time.monotonic() < deadline:  # until it grew, and rests
            size = file.stat().st_size
            time.sleep(0.001)
        return re.findall(r'File ".*/([^/]+)", line \d+ in (\w+)', file.read_text()[before:])

    def _names(self) -> list[str]:
        with suppress(OSError):
            return os.listdir(self.checkpoints)
        return []


def _is_of(frame: tuple[str, str], file: str, function: str) -> bool:
    return frame[0] == file and function in ("", frame[1])


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(name: str) -> str:
    """A file below /proc; empty if its process is gone."""
    with suppress(OSError):
        return Path("/proc", name).read_text(errors="replace")
    return ""


def _link(name: str) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{name}")
    return ""


def _state(pid: int) -> str:
    return (_read(f"{pid}/stat").rpartition(")")[2].split() or ["Z"])[0]


def _parent(pid: int) -> int:
    return int((_read(f"{pid}/stat").rpartition(")")[2].split() or ["Z", "0"])[1])


def _environment(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _read(f"{pid}/environ").split("\0"))
    return {name: value for name, _, value in pairs}


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", _read(f"{pid}/status"), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)

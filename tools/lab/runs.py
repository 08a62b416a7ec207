"""Do the lab's jobs, a few at a time, in processes that are forked from one that has loaded everything already.

Importing torch, transformers and Megatron-Core takes most of a short command's time, so the parent imports them
once and computes nothing (no threads, no process group); a child runs one command's ``main`` and exits. What a
command prints goes to ``log.txt`` in the job's folder.

A job continues where it stopped: training from its newest checkpoint, and a finished job (its evaluation exists) is
not done again. A signal to the parent asks the children to save their state; should the parent be killed, they
are asked by the kernel. One lab at a time works in a folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ext.config.errors import ConfigError
from megatron_ext.metrics.writer import METRICS

from .. import module_of
from ..ranks import STORE, free_port
from . import provenance
from .plan import Command, Job

LOG = "log.txt"
EVALUATION_STEPS = 8  # what an evaluation counts in the progress, in training steps
POLL_S = 0.5
PR_SET_PDEATHSIG = 1
PRELOADED = (
    "megatron_ext.train.loop",
    "megatron_ext.rollout.hf.engine",
    *map(module_of, ("train", "convert", "evaluate")),
)


@dataclass
class Running:
    """A job with the child that does its current command."""

    job: Job
    pid: int
    command: int = 0


@dataclass
class RunResult:
    """What became of the jobs that were to be done."""

    failed: list[tuple[Job, str]] = field(default_factory=list)
    interrupted: bool = False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Children inherit it: it is free when the last of them has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another lab is at work there; wait for it, or choose another --dir") from None
        yield


def preload() -> None:
    """Import what the commands need, and let each of them compute on one core."""
    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what the children start


def work(jobs: Sequence[Job], num_at_once: int, show: Callable[[Sequence[Running]], None]) -> RunResult:
    """Do all unfinished jobs, in order as far as they do not wait for one another's models."""
    outcome, waiting, running = RunResult(), [job for job in jobs if not job.finished], list[Running]()
    stop = LabStopped()
    while waiting or running:
        for child in list(running):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                running.remove(child)
                code = os.waitstatus_to_exitcode(status)
                if not code and child.command + 1 < len(child.job.commands) and not stop.received:
                    running.append(start(child.job, child.command + 1))
                elif not code and child.command + 1 == len(child.job.commands):
                    shutil.rmtree(child.job.folder / "checkpoints", ignore_errors=True)  # its weights are exported
                elif code and not stop.received:
                    outcome.failed.append((child.job, f"{child.job.commands[child.command][0]} ended with {code}"))
        while not stop.received and len(running) < num_at_once:
            ready = next((job for job in waiting if _can_start(job, jobs)), None)
            if ready is None:
                break
            waiting.remove(ready)
            running.append(start(ready, 0))
        if stop.received:
            outcome.interrupted, waiting = True, []
            for child in running:
                os.kill(child.pid, signal.SIGTERM)
            stop.wait(running)
            running = []
        elif waiting and not running:
            outcome.failed += [(job, f"{job.needs}, from which it starts, is not finished") for job in waiting]
            waiting = []
        show(running)
        if running:
            time.sleep(POLL_S)
    return outcome


def start(job: Job, number: int) -> Running:
    """Fork a child that does command ``number`` of the job, or the one behind an export that exists."""
    number = max([number, *(i + 1 for i, command in enumerate(job.commands) if _done(command))])
    job.folder.mkdir(parents=True, exist_ok=True)
    provenance.leave(job.folder)
    tool, *arguments = job.commands[number]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _settle(job.folder / LOG, parent)
            os.environ.update(environment)
            with tempfile.TemporaryFile() as store:
                if sys.platform == "linux":  # no port, which another process may have taken by now
                    os.environ[STORE] = str(store.fileno())
                print("$ megatron-entropy", tool, *arguments, flush=True)
                code = importlib.import_module(module_of(tool)).main(arguments) or 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Running(job, pid, number)


def steps_done(job: Job) -> int:
    """Progress of a job in training steps, its evaluation included."""
    if job.finished:
        return job.steps + EVALUATION_STEPS
    metrics = job.folder / METRICS
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _can_start(job: Job, jobs: Sequence[Job]) -> bool:
    return job.needs is None or any(other.finished for other in jobs if other.name == job.needs)


def _done(command: Command) -> bool:
    """An export is a folder that appears whole; training knows by itself."""
    return command[0] == "convert" and Path(command[-1]).exists()


def _settle(log: Path, parent: int) -> None:
    """A child's own output, signals and end."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent asks in its own way
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


class LabStopped:
    """SIGINT and SIGTERM end the lab between two looks at its children."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True

    @staticmethod
    def wait(running: Sequence[Running]) -> None:
        for child in running:
            os.waitpid(child.pid, 0)

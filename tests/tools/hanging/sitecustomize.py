"""Makes a rank of a real run hang, from outside: every process that finds this runs it at its start.

In the environment: HANG, one of WAYS; HANG_RANK; HANG_STEP, counted from 1; HANG_PIPE, a pipe that nobody writes to.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.abc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

SILENCE_S = 10  # in the place of a minute or so
SLOW_S = 1.5 * SILENCE_S


def spin() -> None:
    while True:
        pass


def hold_interpreter() -> None:
    ctypes.PyDLL(None).sleep(3600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_in_kernel() -> None:
    """In state D, as on a dead file system: a parent until its child, which cannot open its input, has begun."""
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.environ["HANG_PIPE"], os.O_RDONLY, 0)]
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=actions)


def deaf() -> None:
    """A deadlock of a rank whose main thread no signal reaches."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


WAYS = {each.__name__: each for each in (spin, hold_interpreter, stop, wait_in_kernel, deaf)}


def in_the_update(loop: Any) -> None:
    from megatron_ext.train.step import Learner

    real_step, real_update, steps = loop.train_step, Learner.update, []

    def train_step(trainer: Any, watch: Any) -> Any:
        steps.append(trainer.step + 1)
        return real_step(trainer, watch)

    def update(learner: Any, *arguments: Any) -> Any:
        if steps[-1] == int(os.environ["HANG_STEP"]):
            WAYS[os.environ["HANG"]]()
        return real_update(learner, *arguments)

    loop.train_step = train_step
    Learner.update = update  # pyright: ignore[reportAttributeAccessIssue]


def alone_in_a_collective(loop: Any) -> None:
    """Rank 0 waits in a collective that rank 1 never enters."""
    import torch.distributed as dist

    real = loop.train_step

    def train_step(trainer: Any, watch: Any) -> Any:
        if trainer.step + 1 == int(os.environ["HANG_STEP"]):
            group: Any = dist.new_group(backend="gloo")
            if dist.get_rank() == 0:
                dist.barrier(group)
        return real(trainer, watch)

    loop.train_step = train_step


def slow_to_score(loop: Any) -> None:
    from megatron_ext.rollout.rewards.reward_pool import RewardPool
    from megatron_ext.rollout.rewards.worker_pool import Scoring

    def slow(kind: Any, name: str) -> None:
        real = getattr(kind, name)

        def score(self: Any, answers: Any) -> Any:
            time.sleep(SLOW_S)
            print("slow to score", flush=True)
            return real(self, answers)

        setattr(kind, name, score)

    slow(RewardPool, "score")  # of the data's own answers
    slow(Scoring, "score_samples")


def shorter(heartbeat: Any) -> None:
    heartbeat.SILENCE_S = SILENCE_S


def sooner(watchdog: Any) -> None:
    watchdog.STOPPED_S = SILENCE_S


class Patch(importlib.abc.MetaPathFinder):
    """``change(module)`` when the module ``name`` has been imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        @functools.wraps(execute)
        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def patch(name: str, change: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:  # of a process that started warm
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, Patch(name, change))


if "HANG" in os.environ:
    how, rank = os.environ["HANG"], os.environ.get("RANK")
    patch("megatron_ext.heartbeat", shorter)
    patch("tools.watchdog", sooner)
    if how == "alone_in_a_collective" and rank is not None:
        patch("megatron_ext.train.loop", alone_in_a_collective)
    elif rank == os.environ["HANG_RANK"]:
        patch("megatron_ext.train.loop", slow_to_score if how == "slow_to_score" else in_the_update)

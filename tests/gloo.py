"""Run a function on N forked gloo ranks: the distributed tests are ordinary functions."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call ``function(rank, world, *args)`` on ``world`` forked ranks and return their results in rank order.

    Each rank has an initialised gloo default group and one thread. The first rank's exception is raised
    here with the traceback of the rank; ranks still running after ``timeout`` seconds are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(function, rank, world, args, Path(folder)) for rank in range(world)]
        deadline, failed = time.monotonic() + timeout, False
        waiting = dict(enumerate(children))
        while waiting and not failed and time.monotonic() < deadline:
            for rank, child in list(waiting.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del waiting[rank]
                    failed |= status != 0
            time.sleep(0.002)
        if failed:  # the others usually fail too, a moment later, for want of the first: let them report
            time.sleep(0.2)
        for child in waiting.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return _collect(Path(folder), world, failed, sorted(waiting))


def _collect(folder: Path, world: int, failed: bool, unfinished: list[int]) -> list[Any]:
    reports = {rank: (folder / f"{rank}.error").read_text() for rank in range(world) if _exists(folder, rank)}
    if reports:
        first = min(reports, key=lambda rank: (folder / f"{rank}.error").stat().st_mtime_ns)
        raise AssertionError(f"rank {first} of {world} failed:\n{reports[first]}")
    if failed:
        raise AssertionError(f"a rank of {world} died without a report")
    if unfinished:
        raise AssertionError(f"ranks {unfinished} of {world} did not finish in time")
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def _exists(folder: Path, rank: int) -> bool:
    return (folder / f"{rank}.error").exists()


def _fork(function: Callable[..., Any], rank: int, world: int, args: tuple, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        result = pickle.dumps(function(rank, world, *args))
        (folder / f"{rank}.result").write_bytes(result)
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"{rank}.error.tmp").write_text(traceback.format_exc())
        (folder / f"{rank}.error.tmp").rename(folder / f"{rank}.error")
    finally:
        os._exit(code)

"""Start the ranks of a run on this machine and see them through.

A laptop or a single node needs no launcher of its own: the parent starts one process per rank with the usual
environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), passes signals on, and ends the others
when one fails. The exit code is the first failing rank's, so 2 (configuration), 3 (reward health) and 75
(requeue) reach the caller.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_S = 20.0  # between asking the remaining ranks to end and killing them


def launched() -> bool:
    """Whether a launcher has already made this process a rank."""
    return "RANK" in os.environ


def run_ranks(module: str, arguments: Sequence[str], world: int) -> int:
    """``python -m module arguments`` on ``world`` local ranks; returns the exit code."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    environment.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")  # Megatron's, once per rank
    command = [sys.executable, "-m", module, *arguments]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]

    def forward(number: int, _frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, forward)
    return _wait(ranks)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while any(rank.poll() is None for rank in ranks):
        failed = [rank for rank in ranks if rank.poll() not in (None, 0)]
        if failed:
            time.sleep(1.0)  # ranks that fail together end together
            _end(ranks)
            return failed[0].returncode if failed[0].returncode > 0 else 128 - failed[0].returncode
        time.sleep(0.05)
    return max(128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks)


def _end(ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGINT)
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Start the ranks of one node and see them through.

    python -m tools.ranks --nodes 2 --ranks-per-node 8 --master HOST:PORT tools.train RECIPE [key=value ...]

The parent starts one process per rank with the usual environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), passes signals on, and ends the others when one fails. SIGUSR1 asks for a save and an end: a rank that
does not listen yet, because it is still loading, gets it again until it does. The exit code is the first failing
rank's, so 2 (configuration), 3 (reward health) and 75 (requeue) reach the caller. On a laptop tools.train does this by
itself; under Slurm one such launcher runs per node and takes its number from SLURM_NODEID. ``--numa-binding node``
lets each rank run on the CPUs near its GPU alone; where that cannot be known, it says so and binds none.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tools.numa import NoBinding, cpus_of_ranks

REQUEUE = 75  # a rank that saved its state on a signal: the others do the same
RESEND_S = 1.0  # between two sendings of SIGUSR1
GRACE_S = 20.0  # between asking the remaining ranks to end and killing them


def launched() -> bool:
    """Whether a launcher has already made this process a rank."""
    return "RANK" in os.environ


def local_rank() -> int:
    """This rank's number on its node."""
    return int(os.environ["LOCAL_RANK"])


def run_ranks(
    module: str,
    arguments: Sequence[str],
    ranks_per_node: int,
    *,
    nodes: int = 1,
    node: int = 0,
    master: str = "",
    bind: bool = False,
) -> int:
    """``python -m module arguments`` on this node's ranks; returns the exit code.

    ``master`` is ``host:port`` of node 0; on a single node a free local port serves. ``bind``: to the CPUs near each
    rank's GPU.
    """
    host, _, port = (master or f"127.0.0.1:{free_port()}").rpartition(":")
    environment = {
        **os.environ,
        "WORLD_SIZE": str(nodes * ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    threads = max(1, len(os.sched_getaffinity(0)) // ranks_per_node)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")  # Megatron's, once per rank
    command = [sys.executable, "-m", module, *arguments]
    cpus = _cpus(ranks_per_node) if bind else None  # asked before the ranks start: their threads inherit the binding
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the ranks inherit it: too early a signal must not kill one
    ranks = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(node * ranks_per_node + rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks_per_node)
    ]
    if cpus is not None:
        for rank, own in zip(ranks, cpus, strict=True):
            os.sched_setaffinity(rank.pid, own)

    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        _send(ranks, number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, forward)
    return _wait(ranks, received)


def _cpus(num_ranks: int) -> list[set[int]] | None:
    try:
        return cpus_of_ranks(num_ranks)
    except NoBinding as reason:
        print(f"ranks: bound to no CPUs: {reason}", file=sys.stderr)
        return None


def _send(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _wait(ranks: list[subprocess.Popen], received: list[int]) -> int:
    resend = time.monotonic()
    while any(rank.poll() is None for rank in ranks):
        if signal.SIGUSR1 in received and time.monotonic() > resend + RESEND_S:
            resend = time.monotonic()
            _send(ranks, signal.SIGUSR1)
        failed = [rank for rank in ranks if rank.poll() not in (None, 0, REQUEUE)]
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--master", default="", help="host:port of node 0 (default: a free port of this machine)")
    parser.add_argument("--node", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    parser.add_argument("--numa-binding", choices=("node", "none"), default="none", help="CPUs that a rank may use")
    parser.add_argument("module", help="for example tools.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    o = parser.parse_args(arguments)
    if o.nodes > 1 and not o.master:
        parser.error(f"--nodes {o.nodes} needs --master HOST:PORT, an address that every node reaches")
    bind = o.numa_binding == "node"
    return run_ranks(o.module, o.arguments, o.ranks_per_node, nodes=o.nodes, node=o.node, master=o.master, bind=bind)


if __name__ == "__main__":
    sys.exit(main())

"""Start the ranks of one node and see them through.

    python -m tools.ranks --nodes 2 --node I --ranks-per-node 8 --master HOST:PORT tools.train RECIPE [key=value ...]

The parent starts one process per rank with the usual environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT) and ends the others when one fails. The exit code is the first failing rank's, so 2 (configuration), 3
(training health) and 75 (requeue) reach the caller. On a laptop tools.train does this by itself; under Slurm one such
launcher runs per node and takes its number from SLURM_NODEID. ``--numa-binding node`` lets each rank run on the CPUs
near its GPU alone; where that cannot be known, it says so and binds none.

Signals are the parent's: ranks are in process groups of their own, so a terminal's Ctrl-C does not reach them, and
they ignore what comes before they listen (train/signals.py). SIGTERM, SIGUSR1, SIGHUP and the first SIGINT become
SIGUSR1, sent until the ranks have saved and ended; a second SIGINT ends them at once, exit code 130. A rank dies with
its parent, whatever ends that. One that hangs (watchdog.py) ends the run, exit code 77, after all have shown their
Python stacks.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO

from megatron_ext import heartbeat
from megatron_ext.train.signals import REQUEUE

from . import faults
from .arguments import whole_number
from .numa import NoBinding, cpus_of_ranks
from .watchdog import Watchdog

INTERRUPTED, HUNG = 130, 77  # exit codes: 77 is above 75, because of several nodes' codes srun returns the largest
SAID_BY_RANKS = (2, 3, 4, 76)  # exit codes whose reason a rank has said
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
RESEND_S = 1.0  # between two sendings of the same signal
GRACE_S = 20.0  # between asking the remaining ranks to end and killing them
STORE = "RANKS_STORE_FD"  # of the file in which ranks of a single node meet (model/parallel.py), in their environment
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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

    ``master`` is ``host:port`` of node 0, where there are several. Ranks of a single node meet in a file without a
    name, which no other user can open. ``bind``: to the CPUs near each rank's GPU.
    """
    environment = _environment(nodes, ranks_per_node, master if nodes > 1 else f"127.0.0.1:{free_port()}")
    command = [sys.executable, "-m", module, *arguments]
    cpus = _cpus(ranks_per_node) if bind else None
    first = node * ranks_per_node
    with ExitStack() as opened:
        received = opened.enter_context(_received())
        shared = opened.enter_context(faults.shared_file())
        store, beats, *stacks = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(2 + ranks_per_node)]
        slots = heartbeat.Slots(beats, ranks_per_node)
        environment[faults.FILE], environment[heartbeat.SLOTS] = str(shared.fileno()), str(beats.fileno())
        if nodes == 1 and sys.platform == "linux":
            environment[STORE] = str(store.fileno())
        parent = os.getpid()
        ranks = [
            subprocess.Popen(
                command,
                env={
                    **environment,
                    "RANK": str(first + rank),
                    "LOCAL_RANK": str(rank),
                    heartbeat.STACKS: str(stacks[rank].fileno()),
                },
                process_group=0,
                pass_fds=(shared.fileno(), store.fileno(), beats.fileno(), stacks[rank].fileno()),
                preexec_fn=partial(_prepare, parent, cpus[rank] if cpus else None),
            )
            for rank in range(ranks_per_node)
        ]
        watchdog = Watchdog(ranks, slots, stacks, first=first, alone=nodes == 1)
        return _Node(ranks, first, received, shared, watchdog).wait()


def _environment(nodes: int, ranks_per_node: int, master: str) -> dict[str, str]:
    """What all ranks of this node have in common."""
    host, _, port = master.rpartition(":")
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
    return environment


@contextmanager
def _received() -> Iterator[list[int]]:
    """The signals that came meanwhile; each is answered with a line. SIGHUP is left alone under nohup."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        again = number == signal.SIGINT and received.count(number) > 1
        answer = "the ranks end at once" if again else "the ranks save after this step and end"
        hint = "; again: they end at once" if number == signal.SIGINT and not again else ""
        os.write(2, f"{signal.Signals(number).name}: {answer}{hint}\n".encode())  # print is not safe in a handler

    before = {each: signal.getsignal(each) for each in SIGNALS}
    heard = [each for each in SIGNALS if each != signal.SIGHUP or before[each] != signal.SIG_IGN]
    for each in heard:
        signal.signal(each, note)
    try:
        yield received
    finally:
        for each in heard:
            signal.signal(each, before[each])


_libc = ctypes.CDLL(None)  # loaded before any fork


def _prepare(parent: int, cpus: set[int] | None) -> None:
    """In a rank's process, before its program: it is bound, dies with its parent, ignores signals until it listens."""
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could take this one along
        os._exit(1)


def _cpus(num_ranks: int) -> list[set[int]] | None:
    try:
        return cpus_of_ranks(num_ranks)
    except NoBinding as reason:
        print(f"ranks: bound to no CPUs: {reason}", file=sys.stderr)
        return None


class _Node:
    """This node's ranks, numbered from ``first``, until the last has ended.

    ``received``: the launcher's signals. ``shared``: the file of faults, from which the ranks take their exit code.
    """

    def __init__(
        self,
        ranks: list[subprocess.Popen],
        first: int,
        received: list[int],
        shared: IO[bytes],
        watchdog: Watchdog,
    ):
        self.ranks, self.first, self.received, self.shared, self.watchdog = ranks, first, received, shared, watchdog
        self._sent = float("-inf")

    def wait(self) -> int:
        """The exit code of this node."""
        left = None  # since a rank has saved and left
        while any(rank.poll() is None for rank in self.ranks):
            if self.received.count(signal.SIGINT) > 1:
                self._end()
                return INTERRUPTED
            has_left = any(rank.poll() == REQUEUE for rank in self.ranks)
            if self.received or has_left:  # one that was asked alone, while starting, is waited for by the others
                self._resend(signal.SIGUSR1)
            failed = [index for index, rank in enumerate(self.ranks) if rank.poll() not in (None, 0, REQUEUE)]
            if failed:
                self._name(failed)
                time.sleep(RESEND_S)  # ranks that fail together end together
                self._end()
                return min((self._code(index) for index in failed), key=lambda code: code not in SAID_BY_RANKS)
            if has_left and left is None:
                left = time.monotonic()
            if left is not None and time.monotonic() > left + GRACE_S:
                self._end()  # they wait for one that will not come
                return REQUEUE
            if hung := self.watchdog.look():
                print(self.watchdog.report(hung), file=sys.stderr, flush=True)
                faults.claim(self.shared.fileno(), HUNG)  # the others' broken connections are not worth a word
                for index in hung:
                    self.ranks[index].kill()
                self._end()
                return HUNG
            time.sleep(_POLL_S)
        self._name([index for index, rank in enumerate(self.ranks) if rank.returncode not in (0, REQUEUE)])
        return max(self._code(index) for index in range(len(self.ranks)))

    def _code(self, index: int) -> int:
        code = self.ranks[index].returncode
        return code if code >= 0 else 128 - code

    def _name(self, failed: Sequence[int]) -> None:
        for index in failed:
            code = self.ranks[index].returncode
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}{self.watchdog.place(index)}"
            elif code in SAID_BY_RANKS:
                continue
            else:
                how = f"ended with exit code {code}"
            others = "; the others are ended" if len(self.ranks) > 1 else ""
            print(f"ranks: rank {self.first + index} {how}{others}", file=sys.stderr)

    def _resend(self, number: int) -> None:
        """Send at most every RESEND_S seconds: a rank that is still loading does not listen yet."""
        if time.monotonic() > self._sent + RESEND_S:
            self._sent = time.monotonic()
            for rank in self.ranks:
                if rank.poll() is None:
                    rank.send_signal(number)

    def _end(self) -> None:
        """Ask the remaining ranks to end at once, and kill those that cannot."""
        deadline, self._sent = time.monotonic() + GRACE_S, float("-inf")
        while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < deadline:
            self._resend(signal.SIGINT)
            time.sleep(_POLL_S)
        for rank in self.ranks:
            if rank.poll() is None:
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
    parser.add_argument("--nodes", type=whole_number(1), default=1)
    parser.add_argument("--ranks-per-node", type=whole_number(1), required=True)
    parser.add_argument("--master", default="", help="host:port of node 0 (default: a free port of this machine)")
    parser.add_argument("--node", type=whole_number(0), help="this node's number, from 0 (default: SLURM_NODEID)")
    parser.add_argument("--numa-binding", choices=("node", "none"), default="none", help="CPUs that a rank may use")
    parser.add_argument("module", help="for example tools.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    o = parser.parse_args(arguments)
    told = os.environ.get("SLURM_NODEID") if o.node is None else o.node
    if o.nodes > 1 and told is None:
        parser.error(f"--nodes {o.nodes} needs --node, this node's number from 0: each node starts its own ranks")
    node = int(told or 0)
    if node >= o.nodes:
        parser.error(f"--node: found {node}, expected a number below --nodes {o.nodes}")
    host, _, port = o.master.rpartition(":")
    if o.nodes > 1 and not (host and port.isdecimal()):
        found = f", found {o.master!r}" if o.master else ""
        parser.error(f"--nodes {o.nodes} needs --master HOST:PORT, an address that every node reaches{found}")
    bind = o.numa_binding == "node"
    return run_ranks(o.module, o.arguments, o.ranks_per_node, nodes=o.nodes, node=node, master=o.master, bind=bind)


if __name__ == "__main__":
    sys.exit(main())

"""Runs a server for a trainer and ends it with the trainer. A script of the standard library alone.

    python keeper.py GRACE_S PROCESSORS COMMAND...

Standard input is a pipe whose other end the trainer holds and never writes to: it closes when the trainer wants the
server to end, and also when the trainer dies, however it dies. The server then gets SIGTERM and ``GRACE_S`` seconds.
Whichever of the two ends first, the whole process group is killed, so that no worker of the server outlives it.
``PROCESSORS`` are the numbers of those it may run on, by commas.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

SETTLE_S = 0.5  # for the workers of a server that has ended to remove their shared memory


def main() -> None:
    os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
    server = subprocess.Popen(sys.argv[3:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_trainer, args=(server,), daemon=True).start()
    server.wait()
    time.sleep(SETTLE_S)
    os.killpg(0, signal.SIGKILL)


def _end_with_the_trainer(server: subprocess.Popen[bytes]) -> None:
    os.read(sys.stdin.fileno(), 1)
    server.terminate()
    try:
        server.wait(float(sys.argv[1]))
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()

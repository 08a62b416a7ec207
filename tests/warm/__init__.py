"""Commands of this project in real processes that are there at once: forks of one that has imported everything.

A rank imports torch, Megatron-Core and transformers for eight seconds of a core before its first step. Here a server
does that once per pytest process (another one with Transformer Engine's sources); ``Popen`` and ``run`` ask it for a
fork, which goes on as ``python -m tools.NAME`` would: its own pid, session, standard streams, environment, directory,
signals and exit code. What it starts in turn by ``subprocess`` (the launcher its ranks) is forked from it likewise.
``console`` is a ``megatron-entropy`` for scripts. Workers that verify answers are forked from one that knows SymPy,
those of a test's own pools too but in tests/rollout.

Not shown by such a process: that a fresh interpreter imports what it needs, in the right order, and what depends on it
(warnings of imports, PYTHONHASHSEED, /proc/PID/cmdline and environ). Tests of that start fresh ones, and so do the
first run of tests/train/test_run.py, the soak, the wheel's and Slurm's. With COLD_STARTS=1 all do.
"""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.warm import client
from tests.warm.process import VERIFIER, VERIFIERS, Warm, request

ROOT = Path(__file__).parents[2]
START_S = 600.0  # for the server's imports, on a machine that does much else
PRELOADED = {"tests.transformer_engine": "tests.transformer_engine.preloaded"}  # package: by its own server
COMMANDS, VERIFYING = "", "tests.warm.verifier"
COLD = bool(os.environ.get("COLD_STARTS"))


class Popen(Warm):
    """``subprocess.Popen`` for ``[sys.executable, "-m", "tools.NAME", ...]``; without ``preexec_fn``.

    The process is no child of this one: its status comes from the server.
    """

    def _start(self, options: dict[str, Any], streams: Sequence[int]) -> int:
        assert options["preexec_fn"] is None and not options["pass_fds"]
        asked = request(options)
        name = asked["module"]
        if name == VERIFIER:
            server = _server(VERIFYING)
        else:
            server = _server(PRELOADED.get(name.rpartition(".")[0], COMMANDS))
            asked["environment"] |= {VERIFIERS: _server(VERIFYING)}
        self._reply = client.ask(server, asked | {"session": bool(options["start_new_session"])}, streams)
        return self._reply.pid


def run(
    command: Sequence[str], *, input: str | None = None, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with ``capture_output`` and ``text``."""
    kind = subprocess.Popen if COLD else Popen
    given = subprocess.DEVNULL if input is None else subprocess.PIPE
    with kind(command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            said, complained = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def popen(command: Sequence[str], **options: Any) -> subprocess.Popen:
    return (subprocess.Popen if COLD else Popen)(command, **options)


def console(folder: Path) -> Path:
    """``folder`` with a ``megatron-entropy`` in it, to come first in a script's PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "megatron-entropy"
    fresh = [sys.executable, "-m", "tools.cli"]
    command = fresh if COLD else ["env", f"{VERIFIERS}={_server(VERIFYING)}", *_ask(), "tools.cli"]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)
    return folder


def _ask() -> list[str]:
    return [sys.executable, "-IS", client.__file__, _server(COMMANDS)]


def start_verifiers_warm() -> None:
    """From now on, those of pools in this process."""
    from megatron_ext.rollout.rewards import worker_pool  # not before a server imports what has to be the first

    module: Any = worker_pool
    if not COLD:
        module.subprocess = SimpleNamespace(**(vars(subprocess) | {"Popen": Popen}))


@functools.cache
def _server(preloaded: str) -> str:
    """The socket of this process's server, which dies with it. ``preloaded``: the module that it imports, COMMANDS for
    what these need."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    path, log = folder / "socket", folder / "log"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with log.open("wb") as said:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm.server", str(path), *filter(None, [preloaded])],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,  # it ends where this process ends (not with the thread that started it, as a signal)
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + START_S
    while not path.exists():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return str(path)

"""The repository's commands in processes of their own.

On a GPU each starts from nothing, as from a shell. In a rehearsal they are forked from a server that has imported what
they import and does nothing else: seconds saved on every command.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from tests.gpu.harness import Here

PRELOADED = ["megatron_ext.train.loop", "megatron_ext.rollout.hf.engine", "tools.train", "tools.convert"]


class Command:
    """``python -m module arguments``, started; its output goes to a file."""

    def __init__(
        self, here: Here, module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.module, self.log = module, here.folder / f"{module}-{len(list(here.folder.glob('*.log')))}.log"
        context: Any = multiprocessing.get_context("forkserver" if here.rehearse else "spawn")
        if here.rehearse:
            context.set_forkserver_preload(PRELOADED)
        changes = dict(environment or {})
        self.process: BaseProcess = context.Process(
            target=_main, args=(module, list(arguments), changes, str(self.log))
        )
        before = dict(os.environ)
        if not here.rehearse:  # a spawned process has them before its first import; a fork server would keep them
            os.environ.update(changes)
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> int | None:
        """SIGKILL; the exit code, which is -9 unless it had ended before."""
        self.process.kill()
        self.process.join()
        return self.process.exitcode

    def wait(self) -> None:
        """Raises AssertionError with the end of its output if it fails."""
        self.process.join()
        print(self.output[-3000:], flush=True)
        assert self.process.exitcode == 0, f"{self.module} ended with {self.process.exitcode}\n{self.output[-5000:]}"

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _main(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """In the new process; a forked one has its server's environment."""
    os.environ.update(environment)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(importlib.import_module(module).main(arguments))

"""Chat templates rendered in a fork of the test's process.

Every run and every evaluation renders its prompts in a process of its own (megatron_ext/rollout/chat_template.py),
which imports transformers for a second and a half of a core. Here the same program, within the same limits, runs in a
fork, which has imported it already. tests/rollout/test_chat_template.py starts the process, as the product does.
"""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any, NoReturn

from megatron_ext.rollout import chat_template


class InFork:
    """In the place of ``subprocess`` in the module that renders."""

    TimeoutExpired = subprocess.TimeoutExpired

    @staticmethod
    def run(
        command: Sequence[str], *, input: str, env: Mapping[str, str], timeout: float, **_others: Any
    ) -> subprocess.CompletedProcess[str]:
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as told,
            tempfile.TemporaryFile() as complained,
        ):
            given.write(input.encode())
            given.seek(0)
            pid = os.fork()
            if pid == 0:
                _render(given, told, complained, env, math.ceil(timeout))
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGALRM:
                raise subprocess.TimeoutExpired(command, timeout)
            return subprocess.CompletedProcess(command, code, _text(told), _text(complained))


def _render(given: IO[bytes], told: IO[bytes], complained: IO[bytes], env: Mapping[str, str], timeout: int) -> NoReturn:
    code = 1
    try:
        for number, file in enumerate((given, told, complained)):
            os.dup2(file.fileno(), number)
        _ = sys.stdin, sys.stderr  # kept, for one that owns its descriptor would close what has its number now
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8")  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), write_through=True)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(env)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(timeout)
        chat_template.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def fork() -> None:
    """From now on, in this process and its forks."""
    module: Any = chat_template
    module.subprocess = InFork

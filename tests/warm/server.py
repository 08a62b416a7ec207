"""Imports what the commands need, then forks a process for every request (tests/warm/__init__.py).

python -m tests.warm.server SOCKET [MODULE]      MODULE: what is imported instead

Between the server and each process stands a fork that waits for it and tells how it ended.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tests.warm import client
from tests.warm.process import become

NOT_HERE = ("bench", "launch")  # want packages of other environments
LATER = (  # what a run imports when it gets there
    *("megatron_ext.train.loop", "megatron_ext.rollout.hf.engine", "megatron_ext.rollout.chat_template"),
    *("transformers.models.qwen2.modeling_qwen2", "transformers.utils.chat_template_utils", "torch._dynamo"),
    *("tools.report.page", "matplotlib.pyplot", "datasets", "huggingface_hub.repocard", "rich._emoji_codes"),
)


def preload(*names: str) -> None:
    for name in names or [*_commands(), *LATER]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported is nobody's garbage, and stays shared


def _commands() -> list[str]:
    from tools.cli import COMMANDS  # not before another module was asked for, which may have to be the first

    return [f"tools.{module}" for name, (module, _) in COMMANDS.items() if name not in NOT_HERE]


def serve(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path.with_suffix(".new")))
        listener.listen(64)
        path.with_suffix(".new").rename(path)  # it is there when it answers
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks between
        while 0 not in select.select([listener, 0], [], [])[0]:  # standard input ends with the process that asks
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, streams = client.take(connection)
        pid = os.fork()
        if pid == 0:
            connection.close()
            session = request.pop("session")
            become(**request, streams=streams, before=os.setsid if session else None)
        for stream in streams:
            os.close(stream)
        client.send_number(connection, pid)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):  # nobody asks any more
            client.send_number(connection, status)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    preload(*sys.argv[2:])
    serve(Path(sys.argv[1]))

"""Processes of ``vllm serve``: start, wait until healthy, kill, start again, and never leave one behind.

Each runs under rollout/vllm_server/keeper.py in a session of its own; its output goes to ``server-<n>.log``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext import heartbeat
from megatron_ext.rollout.base import RolloutError
from megatron_ext.rollout.vllm_server import guard, keeper
from megatron_ext.rollout.vllm_server.http_api import CHECK_S, RequestRefused, ServerFault, ask_all

START_S = 1800.0  # to load a large model and compile it
POLL_S = 0.2
GRACE_S = 10.0  # for a server to end by itself
TAIL_BYTES = 3000  # of a server's output in an error
GUARD = f"{guard.__name__}.{guard.Guard.__name__}"
TRAINERS_OWN = (  # variables of torchrun, of Megatron-Core and of the trainer's own vLLM that must not reach a server
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"),
)
log = logging.getLogger(__name__)


@dataclass
class ServerProcess:
    """One server of ours. ``environment`` is added to the trainer's, whose rank is bound to the processors near its
    GPU; the server has those of its launcher. Each start has a ``token`` of its own: what was sent to who listened in
    the place of a dead server opens nothing."""

    url: str
    command: list[str]
    environment: Mapping[str, str]
    log_file: Path
    token: str = field(default="", init=False, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _log_start: int = field(default=0, init=False)

    def start(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(32)
        own = {name: value for name, value in os.environ.items() if name not in TRAINERS_OWN}
        processors = ",".join(map(str, os.sched_getaffinity(os.getppid())))
        with self.log_file.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-IS", keeper.__file__, str(GRACE_S), processors, *self.command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=own | dict(self.environment) | {guard.TOKEN_VARIABLE: self.token},
                start_new_session=True,
                umask=0o077,  # vLLM's processes talk over sockets in the folder of temporary files
            )

    @property
    def pid(self) -> int:
        """Of the process group with everything the server runs."""
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the whole group at once, also a group that is stopped or whose keeper is gone."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """End it in order: the keeper terminates the server, and kills it if that takes too long."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S + 5)
        self.kill()

    def tail(self) -> str:
        """The end of what it wrote since it was last started."""
        with self.log_file.open("rb") as output:
            output.seek(max(self._log_start, self.log_file.stat().st_size - TAIL_BYTES))
            return output.read().decode(errors="replace")


class Fleet:
    """The servers of a run, on rank 0: ``processes`` of ours by url, or ``given`` ones (url -> token) that run
    already."""

    def __init__(self, processes: Iterable[ServerProcess], given: Mapping[str, str], *, max_restarts: int) -> None:
        self.processes = {process.url: process for process in processes}
        self.given = dict(given)
        self.restarts, self.max_restarts = 0, max_restarts

    @property
    def servers(self) -> dict[str, str]:
        """Url -> token of all that are to be asked."""
        return {url: process.token for url, process in self.processes.items()} | self.given

    def start(self) -> None:
        """Start our own and wait. Raises RolloutError with the end of its log for one that does not come up."""
        for process in self.processes.values():
            process.start()
        try:
            for url, reason in self._wait(self.processes).items():
                raise RolloutError(f"rollout: the server {url} did not start: {reason}")
        except BaseException:
            self.close()
            raise

    def repair(self, faults: Mapping[str, str]) -> None:
        """Replace the servers in ``faults`` (url -> reason): ours are started again, others are left out from now on.

        Raises RolloutError when the restarts are used up or no server is left.
        """
        for url in [url for url in self.given if url in faults]:
            log.warning("rollout: the server %s is left out from now on: %s", url, faults[url])
            del self.given[url]
        if not self.servers:
            raise RolloutError(
                "rollout: no server of rollout.servers.urls is left; the last one: "
                f"{'; '.join(faults.values())}. Start them again and resume the run"
            )
        broken = {url: reason for url, reason in faults.items() if url in self.processes}
        while broken:
            for url, reason in broken.items():
                self._restart(self.processes[url], reason)
            broken = self._wait(broken)

    def close(self) -> None:
        for process in self.processes.values():
            process.stop()

    def _restart(self, process: ServerProcess, reason: str) -> None:
        if self.restarts >= self.max_restarts:
            raise RolloutError(
                f"rollout: a server failed after {self.restarts} restarts, rollout.servers.max_restarts allows "
                f"{self.max_restarts}: {reason}. See why in {process.log_file}, and resume the run"
            )
        self.restarts += 1
        log.warning("rollout: restart %d of at most %d: %s", self.restarts, self.max_restarts, reason)
        process.kill()
        process.start()

    def _wait(self, urls: Iterable[str]) -> dict[str, str]:
        """Until all are healthy; those that are not, with the reason."""
        waiting, faults, end = set(urls), {}, time.monotonic() + START_S
        while waiting:
            heartbeat.progress()  # a start has a deadline of its own
            servers = {url: self.processes[url].token for url in waiting}
            answers = ask_all(servers, "/health", get=True, deadline_s=CHECK_S)
            for url, answer in answers.items():
                process = self.processes[url]
                if not process.alive():
                    waiting.remove(url)
                    faults[url] = f"its process ended; the end of {process.log_file}:\n{process.tail()}"
                elif not isinstance(answer, (ServerFault, RequestRefused)):
                    waiting.remove(url)
                elif time.monotonic() > end:
                    waiting.remove(url)
                    faults[url] = f"not healthy after {START_S:.0f} s; the end of {process.log_file}:\n{process.tail()}"
            time.sleep(POLL_S if waiting else 0)
        return faults


def free_ports(host: str, first: int, num: int) -> None:
    """Raise ValueError unless ``num`` ports from ``first`` on can be listened at."""
    for port in range(first, first + num):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ValueError(
                    f"rollout.servers.port: a server cannot listen at {host}:{port} ({error.strerror}); expected free "
                    f"ports {first} to {first + num - 1}: end what listens there (ss -ltnp), or choose another "
                    "rollout.servers.port or rollout.servers.address"
                ) from None


def serve_command(
    model_path: str | Path, *, host: str, port: int, backend: str, options: Mapping[str, Any]
) -> list[str]:
    """What starts a server. ``options`` are vLLM's engine arguments by their Python names.

    Not ``vllm serve``: it asks for the version of a package named vllm, which the build for CPUs is not.
    """
    fixed = {
        "model": str(Path(model_path).absolute()),
        "trust_remote_code": False,
        "host": host,
        "port": port,
        "tokens_only": True,
        "disable_uvicorn_access_log": True,
        "generation_config": "vllm",  # none of the model's own sampling defaults
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "middleware": GUARD,
        "weight_transfer_config": json.dumps({"backend": backend}),
    }
    # -P: a folder of metadata in the working directory would hide the installed package's plugins from vLLM
    return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *_flags(fixed | dict(options))]


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        dashed = name.replace("_", "-")
        flags += (
            [f"--{dashed}"] if value is True else [f"--no-{dashed}"] if value is False else [f"--{dashed}", str(value)]
        )
    return flags

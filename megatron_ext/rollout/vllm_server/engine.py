"""The rollout engine of servers: vLLM in processes of its own, on this node or on others, driven over HTTP.

Rank 0 of the trainer starts, watches and replaces the servers and sends them the weights, through vLLM's own
trainer-side classes. Every rank sends its own requests to all servers, in rounds: after each the ranks tell each other
what failed, rank 0 replaces the servers at fault, all ranks stream the current weights again, and what is still
missing is asked for again. No answer of other weights than the current ones is used. Once the policy trains, beside
the servers, the current weights cannot be had again: servers at fault are then left out until the next update.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ext.config.positions import max_positions
from megatron_ext.rollout.base import (
    IsNeeded,
    OnBatch,
    Request,
    RolloutError,
    Sampling,
    Weights,
    unfinished,
)
from megatron_ext.rollout.model_files import eos_ids, load_config, load_tokenizer
from megatron_ext.rollout.vllm.common import cpu_arguments, gpu_arguments, mask_arguments, model_runner_variable
from megatron_ext.rollout.vllm_server.fleet import Fleet, ServerProcess, free_ports, serve_command
from megatron_ext.rollout.vllm_server.guard import MIN_TOKEN, TOKEN_VARIABLE
from megatron_ext.rollout.vllm_server.http_api import check_servers
from megatron_ext.rollout.vllm_server.round import Round, RoundResult
from megatron_ext.types import Sample

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of this process, read when vllm is imported

from megatron_ext.rollout.vllm_server.weights import Servers, Source, backend, connect  # noqa: E402

T = TypeVar("T")
CALL_S = 600.0  # for one call to a server that is not a generation, at most
LOOPBACK = "127.0.0.1"


class ServerEngine:
    """Generates with vLLM servers (rollout/base.py::RolloutEngine).

    The servers start with the directory's weights as version 0. ``urls`` are servers that run already, with the token
    that is in the environment's ``token_variable``; without them ``num`` are started on this node, one at each of the
    ports from ``port`` on. Raises ValueError for a port in use, for servers that cannot be driven or have another token
    and for a model without tokenizer or end-of-sequence token, RolloutError when servers fail for good.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str,
        max_tokens: int,
        log_dir: Path,
        batch_size: int = 256,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
        model_runner: str = "auto",
        keeps_support: bool = False,
        urls: Sequence[str] = (),
        token_variable: str = TOKEN_VARIABLE,
        num: int = 1,
        port: int = 8100,
        devices: Sequence[str] = (),
        address: str = "",
        deadline_s: float = 1800.0,
        max_restarts: int = 3,
    ) -> None:
        """``max_tokens``: of prompt and response together. ``batch_size``: sequences one server decodes at once.
        ``model_runner``: vLLM's, auto, v1 or v2; a server's log says which it has. ``address``: this node's, where
        servers or ranks are on others. ``deadline_s``: for one response. ``keeps_support``: as in VLLMEngine."""
        self.tokenizer = load_tokenizer(model_path)
        self.eos = eos_ids(model_path)
        config = load_config(model_path)
        max_tokens = min(max_tokens, max_positions(config.to_dict()) or max_tokens)
        self.vocab_size = config.vocab_size
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world = dist.get_world_size() if self.distributed else 1
        # ranks wait in it for servers that start and for the longest response: for longer than in the trainer's groups
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if self.distributed else None
        self.deadline_s, self.slots = deadline_s, -(-batch_size // self.world)
        self.address = address or LOOPBACK
        self.version, self.weights = 0, None
        self.left_out: dict[str, str] = {}  # servers at fault, which the next update replaces, with the reason
        self.is_connected = False  # whether all servers are in the transfer
        self.num_restarts = self.num_stale = self.num_failed = 0
        self.client = Servers(min(CALL_S, deadline_s))
        self.source = Source(self._barrier, self.client.checksum if self.rank == 0 else None)
        self.transfer: Any = None

        def create() -> Fleet:
            if urls:
                token = _given_token(token_variable)
                return _running({url.rstrip("/"): token for url in urls}, max_tokens)
            self._check_devices(devices, address)
            free_ports(self.address, port, num)
            sizes: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "dtype": dtype}
            on_gpu = gpu_arguments(gpu_memory_utilization, batch_size=batch_size)
            options = {
                "dtype": dtype,
                "tensor_parallel_size": tensor_parallel_size,
                "max_model_len": max_tokens,
                "max_num_seqs": batch_size,
                "enforce_eager": enforce_eager,
                **mask_arguments(keeps_support, model_runner),
                **(on_gpu if torch.cuda.is_available() else cpu_arguments(config, engines=num, **sizes)),
            }

            def process(number: int) -> ServerProcess:
                at = port + number
                return ServerProcess(
                    f"http://{self.address}:{at}",
                    serve_command(model_path, host=self.address, port=at, backend=backend(), options=options),
                    _environment(devices[number] if devices else None, num) | model_runner_variable(model_runner),
                    log_dir / f"server-{number}.log",
                )

            return Fleet(map(process, range(num)), {}, max_restarts=max_restarts)

        self.servers: dict[str, str] = self._on_chief(lambda: self._start(create()))

    def update_weights(self, weights: Weights, version: int) -> None:
        """Stream them to every server; what was computed with older ones is forgotten. Collective."""
        self.weights, self.version = weights, version
        faults, self.left_out = self.left_out, {}
        self._sync(faults, reconnect=bool(faults) or not self.is_connected)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_batch: OnBatch | None = None,
        is_needed: IsNeeded | None = None,
    ) -> list[Sample]:
        """One sample per request, in order; every rank calls it. Raises RolloutError, on all ranks, when servers fail
        for good or refuse a request."""
        samples: dict[int, Sample] = {}
        was_stale: set[str] = set()
        while True:
            outcome = self._ask(requests, sampling, samples, on_batch, is_needed or (lambda number: True))
            outcomes = self._gather(outcome)
            self.num_failed += sum(each.num_failed for each in outcomes)
            self.num_stale += sum(each.num_stale for each in outcomes)
            for each in outcomes:
                if each.refused is not None:
                    raise RolloutError(f"rollout: a server refuses a request: {each.refused}")
            faults = {url: reason for each in outcomes for url, reason in each.faults.items()}
            stale = {url: reason for each in outcomes for url, reason in each.stale.items()}
            if not faults and not stale:
                return [samples.get(i) or unfinished(request, self.version) for i, request in enumerate(requests)]
            faults |= {url: reason for url, reason in stale.items() if url in was_stale}  # new weights did not help
            was_stale |= set(stale)
            if self.weights is not None and self.weights.closed:
                self._leave_out(faults, stale)
            else:
                self._sync(faults, reconnect=True)

    def metrics(self) -> dict[str, float]:
        """Of the whole run so far: restarts of servers; requests whose server failed, or had other weights."""
        return {
            "servers/restarts": float(self.num_restarts),
            "servers/failed": float(self.num_failed),
            "servers/stale": float(self.num_stale),
        }

    def sleep(self) -> None:
        """Nothing to release: servers have devices of their own."""

    def close(self) -> None:
        """End the servers that were started here."""
        if self.transfer is not None:
            self.transfer.shutdown()
        if self.rank == 0:
            self.fleet.close()

    def _ask(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        samples: dict[int, Sample],
        on_batch: OnBatch | None,
        is_needed: IsNeeded,
    ) -> RoundResult:
        """One round for what ``samples`` lacks and is needed."""
        missing = [number for number in range(len(requests)) if number not in samples and is_needed(number)]
        if not missing:
            return RoundResult()

        def take(number: int, sample: Sample) -> None:
            samples[missing[number]] = sample
            if on_batch is not None:
                on_batch({missing[number]: sample})

        label = None if self.weights is None else str(self.version)
        one = Round(self.servers, label, self.slots, self.deadline_s, self.tokenizer, self.eos, self.vocab_size)
        asked = [requests[number] for number in missing]
        return asyncio.run(one.run(asked, sampling, take, lambda number: is_needed(missing[number])))

    def _leave_out(self, faults: dict[str, str], stale: dict[str, str]) -> None:
        """Ask the others alone until the next update. Raises RolloutError, on all ranks, where there are none."""
        self.left_out |= faults
        self.is_connected = False  # one with other weights may have been started anew
        self.servers = {url: token for url, token in self.servers.items() if url not in faults | stale}
        if not self.servers:
            raise RolloutError(
                f"rollout: no server is left that has the weights of version {self.version}, and the policy trains on "
                f"meanwhile (rollout.max_lag): {'; '.join((faults | stale).values())}. Resume the run: it goes on from "
                "its newest checkpoint"
            )

    def _sync(self, faults: dict[str, str], *, reconnect: bool) -> None:
        """Replace the servers in ``faults``, then stream the weights until all servers have them. Collective."""
        while True:
            self.servers, self.num_restarts = self._on_chief(lambda faults=faults: self._repaired(faults))
            if self.weights is None:
                return
            faults = self._send(reconnect=reconnect)
            if not faults:
                self.is_connected = True
                return
            reconnect = True

    def _start(self, fleet: Fleet) -> dict[str, str]:
        self.fleet = fleet
        fleet.start()
        return fleet.servers

    def _repaired(self, faults: dict[str, str]) -> tuple[dict[str, str], int]:
        if faults:
            self.fleet.repair(faults)
        return self.fleet.servers, self.fleet.restarts

    def _send(self, *, reconnect: bool) -> dict[str, str]:
        """Stream the weights to all servers; those that did not take them, with the reason. Collective."""
        self.source.weights = self.weights
        if self.rank == 0:
            self.client.begin(self.servers, str(self.version))
        if reconnect or self._on_chief(lambda: bool(self.client.faults)):  # a broadcast would wait for a dead server
            if self.transfer is not None:
                self.transfer.shutdown()
                if self.rank == 0:
                    self.client.shutdown_weight_transfer_engine()
            self.transfer = connect(
                self.client, self.source, rank=self.rank, address=self.address, on_chief=self._on_chief
            )
        self.transfer.send_weights()
        return self._on_chief(self.client.end)

    def _check_devices(self, devices: Sequence[str], address: str) -> None:
        if torch.cuda.is_available() and not devices:
            raise ValueError(
                "rollout.servers.devices: names no GPUs, but servers cannot share the trainer's; give the "
                'CUDA_VISIBLE_DEVICES of each server, for example ["6", "7"], and start fewer ranks on this node'
            )
        if not address and self.world > int(os.environ.get("LOCAL_WORLD_SIZE", self.world)):
            raise ValueError(
                "rollout.servers.address: is empty, but ranks on other nodes must reach the servers; give the address "
                "of the first node in the cluster's private network"
            )

    def _on_chief(self, function: Callable[[], T]) -> T:
        """Run it on rank 0; its result, or its exception, on every rank."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except (OSError, ValueError, RolloutError) as error:
                box[1] = error
        if self.distributed:
            dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def _gather(self, own: T) -> list[T]:
        if not self.distributed:
            return [own]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def _barrier(self) -> None:
        if self.distributed:
            dist.barrier(self.group)


def _given_token(variable: str) -> str:
    if len(token := os.environ.get(variable, "")) < MIN_TOKEN:
        raise ValueError(
            f"rollout.servers.token_variable: the environment's {variable} holds {len(token)} characters, expected the "
            f"servers' token of {MIN_TOKEN} or more: start trainer and servers with it, for example from "
            "openssl rand -hex 32"
        )
    return token


def _running(servers: dict[str, str], max_tokens: int) -> Fleet:
    check_servers(servers, backend=backend(), max_tokens=max_tokens)
    return Fleet([], servers, max_restarts=0)


def _environment(devices: str | None, num: int) -> dict[str, str]:
    """Of one of ``num`` servers, over the trainer's."""
    common = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
    common["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"  # the trainer's grow: tools/train.py
    common["VLLM_HOST_IP"] = LOOPBACK  # where its own processes meet, all on this node
    if devices is not None:
        common["CUDA_VISIBLE_DEVICES"] = devices
    if not torch.cuda.is_available():  # servers that bind their threads would all bind them to the same cores
        threads = max(1, len(os.sched_getaffinity(0)) // num)
        common |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return common

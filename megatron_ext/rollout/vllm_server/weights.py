"""The trainer's weights to vLLM servers, through vLLM's own trainer-side classes: what is sent, and to whom."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from megatron_ext.rollout.base import Weights
from megatron_ext.rollout.checksum import Checksum
from megatron_ext.rollout.vllm import weight_transfer
from megatron_ext.rollout.vllm_server.http_api import RequestRefused, ServerFault, ask_all

MAX_WORKERS = 4096  # of one server
CHUNK_BYTES = 512 * 2**20  # gathered on all ranks before any of it is sent


class Source(WeightSource):
    """The stream as vLLM wants it. ``weights`` is set before each round; ``barrier`` waits for all of the trainer.
    ``checksum`` is rank 0's, of what the last pass has yielded; other ranks' tensors may be empty.

    Tensors are gathered in chunks, and a chunk is sent only when all ranks have gathered it: the servers' NCCL group
    and the trainer's must not wait for each other on one GPU.

    vLLM reads the stream on CUDA streams of its own, in turn: the first read waits for what the trainer has in flight
    (its optimizer step), and a tensor that was made on one of them is kept while another reads it.
    """

    def __init__(self, barrier: Callable[[], None], checksum: Checksum | None) -> None:
        self.weights: Weights | None = None
        self.barrier, self.checksum = barrier, checksum

    def metadata(self) -> list[ParamMeta]:
        assert self.weights is not None
        return [ParamMeta(*each) for each in self.weights.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert self.weights is not None
        _settle()
        chunk: list[tuple[str, Tensor]] = []
        size = 0
        if self.checksum is not None:
            self.checksum.clear()
        for name, value in self.weights:
            chunk.append((name, value))
            size += value.nbytes
            if size >= CHUNK_BYTES:
                yield from self._gathered(chunk)
                chunk, size = [], 0
        yield from self._gathered(chunk)

    def _gathered(self, chunk: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        _settle()
        self.barrier()
        for name, value in chunk:
            if self.checksum is not None:
                self.checksum.add(name, value)
            if value.is_cuda:
                value.record_stream(torch.cuda.current_stream())
            yield name, value


def _settle() -> None:
    """Wait for all that this rank's GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Servers:
    """All servers as the one client that vLLM's trainer side speaks to (VLLMWeightSyncClient). Rank 0 uses it.

    A server that fails a call is asked nothing more in this round, and noted in ``faults``: the others get their
    weights, and the trainer's ranks finish the collective that the stream is. A server counts as updated when each of
    its workers has confirmed ``checksum``: what reached the model is what was sent.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s  # of one call
        self.servers: dict[str, str] = {}  # url -> token
        self.worlds: dict[str, int] = {}  # workers of each server
        self.faults: dict[str, str] = {}
        self.version = ""
        self.checksum = Checksum(secrets.token_hex(16))

    def begin(self, servers: Mapping[str, str], version: str) -> None:
        """A new round: stop generation, forget what the servers have cached."""
        self.servers, self.worlds, self.faults, self.version = dict(servers), dict.fromkeys(servers, 0), {}, version
        self._call("/pause?mode=abort")

    def end(self) -> dict[str, str]:
        """Let them generate again; the servers that failed, with the reason."""
        self._call("/resume")
        return self.faults

    def count_workers(self) -> int:
        """How many ranks the servers add to a group with the trainer's first one."""
        for url, answer in self._call("/get_world_size", get=True).items():
            world = answer.get("world_size") if isinstance(answer, dict) else None
            if isinstance(world, int) and 1 <= world <= MAX_WORKERS:
                self.worlds[url] = world
            else:
                self.faults[url] = f"{url}: wrong answer: its number of workers is {str(answer)[:100]}"
        return sum(self.worlds.values())

    def shutdown_weight_transfer_engine(self) -> None:
        self._call("/shutdown_weight_transfer_engine")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        bodies, offset = {}, init_info.get("rank_offset", 0)
        for url, world in self.worlds.items():
            own = init_info | {"checksum_key": self.checksum.key}
            own |= {"rank_offset": offset} if "rank_offset" in init_info else {}
            bodies[url] = {"init_info": own}
            offset += world
        self._call("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._call("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("/update_weights", dict.fromkeys(self.worlds, {"update_info": update_info}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have the checksum confirmed first. vLLM's engines leave the version out: it is the round's."""
        self.update_weights(weight_transfer.confirmation(self.checksum.digest()))
        body = {"weight_version": weight_version or self.version}
        self._call("/finish_weight_update", dict.fromkeys(self.worlds, body))

    def _call(self, path: str, bodies: Mapping[str, Any] | None = None, *, get: bool = False) -> dict[str, Any]:
        live = {url: token for url, token in self.servers.items() if url not in self.faults}
        answers = ask_all(live, path, bodies=bodies, get=get, deadline_s=self.deadline_s)
        failed = {url: each for url, each in answers.items() if isinstance(each, (ServerFault, RequestRefused))}
        self.faults |= {url: str(each) for url, each in failed.items()}
        return {url: answer for url, answer in answers.items() if url not in self.faults}


def backend() -> str:
    """How weights travel on this machine."""
    return weight_transfer.NCCL if torch.cuda.is_available() else weight_transfer.INLINE


def connect(
    client: Servers, source: Source, *, rank: int, address: str, on_chief: Callable[[Callable[[], Any]], Any]
) -> TrainerWeightTransferEngine[Any]:
    """A transfer to the servers of ``client``'s round. Collective; ``on_chief`` runs a function on rank 0 for all.

    With NCCL rank 0 and all workers of all servers are one group: one that has lost a server is of no use any more. A
    server that dies between the round's first question and its last tensor stops rank 0 in NCCL, and the run with it.
    """
    weight_transfer.register()
    if backend() == weight_transfer.INLINE:
        init: Any = weight_transfer.InlineTrainerInit(rank=rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world, port = on_chief(lambda: (1 + client.count_workers(), free_port(address)))
        init = NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=world)
    return WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]

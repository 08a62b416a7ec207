"""Process groups of a layout, and the reducer that methods see.

Tensors travel on Megatron's groups. Python objects, and every wait for something that only some ranks do, belong on
their gloo twins: NCCL would serialise an object through the GPU and gives up after its timeout.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import groups
from megatron_ext.model.build import Overlap
from megatron_ext.model.megatron_config import ModelLayout

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of the gloo twins: one rank may verify data or write for hours
LATER = timedelta(minutes=2)  # than its launcher a rank gives up waiting for one that hangs
_twins: dict[tuple[int, ...], dist.ProcessGroup] = {}  # by the ranks of the group; of more than one rank
_together: tuple[int, ...] = ()  # the ranks that train on the same sequences as this one


def initialize(layout: ParallelConfig, *, seed: int = 0, hang_minutes: float = 15) -> None:
    """Join the default group (from the launcher's environment, unless a test already did) and make Megatron's.

    ``seed`` starts the random states that Megatron keeps for tensor-, expert- and data-parallel regions. A collective
    gives up after ``hang_minutes`` and LATER, after PATIENCE where they are 0.
    """
    patience = timedelta(minutes=hang_minutes) + LATER if hang_minutes else PATIENCE
    if not dist.is_initialized():
        # not bound to its GPU (``device_id``), which cpu_compat.enter() has made the current one: torch 2.13 would then
        # have every rank outside a new group enter NCCL for it, gloo groups included, whose members do not
        dist.init_process_group(cpu_compat.backend(), timeout=patience, **_local_store(patience))
    if dist.get_world_size() != layout.world:
        raise ValueError(
            f"parallel: the recipe's world is nodes {layout.nodes} x ranks_per_node {layout.ranks_per_node} = "
            f"{layout.world} but {dist.get_world_size()} ranks were launched"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=math.ceil(patience / timedelta(minutes=1)),
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _make_twins(layout)


def _local_store(patience: timedelta) -> dict[str, Any]:
    """Where the launcher names loopback, all ranks are on this machine: gloo listens there alone, and the store is the
    launcher's file. Under another launcher it is a server on loopback, to which other users may write.

    What torch makes from the environment listens on all interfaces, and believes what anybody writes to it.
    """
    address = os.environ.get("MASTER_ADDR")
    if address not in ("127.0.0.1", "localhost"):
        return {}
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if "RANKS_STORE_FD" in os.environ:  # tools/ranks.py
        file = dist.FileStore(f"/proc/self/fd/{os.environ['RANKS_STORE_FD']}", world)  # pyright: ignore[reportPrivateImportUsage]
        return {"store": file, "rank": rank, "world_size": world}
    listening = socket.create_server(("127.0.0.1", port), backlog=world).detach() if rank == 0 else None
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1",
        port,
        world,
        is_master=rank == 0,
        timeout=patience,
        multi_tenant=True,  # vLLM in the trainer's processes may ask for it by its address too
        master_listen_fd=listening,
    )
    return {"store": store, "rank": rank, "world_size": world}


def gloo(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """The ranks of ``group`` (data- or pipeline-parallel, or ``same_sequences()``; None: all) over gloo."""
    return _twins[tuple(dist.get_process_group_ranks(group))]


def new_gloo() -> dist.ProcessGroup:
    """All ranks over gloo again, for a second thread: two threads must not meet in one group. Collective."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))


def same_sequences() -> dist.ProcessGroup:
    """The ranks that train on the same sequences: tensor, context and pipeline parallelism together.

    Over gloo where there are several: Megatron has no such group.
    """
    return _twins.get(_together) or groups.model()


def context_rank() -> int:
    """Which of the parts of its sequences this rank has."""
    return groups.context().rank()


def _make_twins(layout: ParallelConfig) -> None:
    """Every rank takes part in making every group, its own or not, in one order."""
    global _together
    _twins.clear()
    everyone = tuple(range(layout.world))
    sizes = {"tp": layout.tensor, "cp": layout.context, "dp": layout.data, "pp": layout.pipeline}
    ranks_of = parallel_state.RankGenerator(**sizes, ep=1, order="tp-cp-ep-dp-pp").get_ranks  # as Megatron's
    sharing = [tuple(ranks) for ranks in ranks_of("tp-cp-pp")]
    _together = next(ranks for ranks in sharing if dist.get_rank() in ranks)
    apart = {ranks for ranks in (*map(tuple, ranks_of("dp")), *map(tuple, ranks_of("pp")), *sharing) if len(ranks) > 1}
    for ranks in sorted(apart | {everyone}):
        twin = dist.new_group(list(ranks), backend="gloo", timeout=PATIENCE)
        if dist.get_rank() in ranks:
            _twins[ranks] = cast(dist.ProcessGroup, twin)


def model_layout(layout: ParallelConfig) -> ModelLayout:
    """What of the layout concerns one copy of the model."""
    return ModelLayout(**layout.model_dump(include={field.name for field in dataclasses.fields(ModelLayout)}))


def overlap(layout: ParallelConfig) -> Overlap:
    """What of the layout concerns the communication between data-parallel ranks."""
    return Overlap(**layout.model_dump(include={field.name for field in dataclasses.fields(Overlap)}))


class DataReducer:
    """The other data-parallel ranks, as a method sees them (methods/base.py::Reducer).

    Context-parallel ranks are not among them: each has the statistics of whole sequences, and computes the same.
    """

    def __init__(self) -> None:
        self.group = groups.data()

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over the data-parallel ranks."""
        total = value.to(cpu_compat.device(), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(value.device)

    def concat(self, value: Tensor) -> Tensor:
        """All ranks' vectors one after the other, in rank order."""
        own, size = value.to(cpu_compat.device()), self.group.size()
        lengths = own.new_empty(size, dtype=torch.int64)
        dist.all_gather_into_tensor(lengths, torch.full_like(lengths[:1], len(own)), group=self.group)
        counts = lengths.tolist()
        padded = torch.cat([own, own.new_zeros(max(counts) - len(own))])
        gathered = own.new_empty(size * len(padded))
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        parts = zip(gathered.view(size, len(padded)), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts]).to(value.device)


def swap(outgoing: Sequence[T], group: dist.ProcessGroup) -> list[T]:
    """``outgoing[r]`` goes to rank r of ``group``; what each rank had for this one, in rank order. Python objects."""
    if group.size() == 1:
        return list(outgoing)
    sent = [torch.frombuffer(bytearray(pickle.dumps(each)), dtype=torch.uint8) for each in outgoing]
    sizes = torch.tensor([len(each) for each in sent])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=gloo(group))
    received = torch.empty(int(coming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(sent), coming.tolist(), sizes.tolist(), group=gloo(group))
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(coming.tolist())]


def max_over_ranks(values: Sequence[int]) -> list[int]:
    """The largest of the data- and context-parallel ranks' values, one by one."""
    box = torch.tensor(values, device=cpu_compat.device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=groups.data_context())
    return box.tolist()


def num_micro_batches(needed: Sequence[int], layout: ParallelConfig) -> list[int]:
    """How many micro-batches of each mini-batch every data-parallel rank runs where this one needs ``needed``.

    As many as any rank needs; the interleaved schedule takes them in groups of as many as there are pipeline ranks.
    """
    group = 1 if layout.virtual == 1 else layout.pipeline
    return [-(-count // group) * group for count in max_over_ranks(needed)]


def from_last_stage(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Give every pipeline stage what the last one computed (the others pass None)."""
    group = groups.pipeline()
    if group.size() == 1:
        assert tensors is not None
        return tensors
    last = dist.get_process_group_ranks(group)[-1]
    box = [None if tensors is None else {name: value.cpu() for name, value in tensors.items()}]
    dist.broadcast_object_list(box, src=last, group=gloo(group))
    assert box[0] is not None
    return {name: value.to(cpu_compat.device()) for name, value in box[0].items()}


def from_first_copy(value: T) -> T:
    """What the last stage of the first copy of the model holds, on every rank: a small Python object."""
    box = [value]
    for group, source in ((groups.pipeline(), -1), (groups.data(), 0)):
        if group.size() > 1:
            dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[source], group=gloo(group))
    return box[0]

"""A process group of any size in one process, its rank 0: every other rank holds what this one holds.

One GPU cannot be two ranks of NCCL. Here gathers repeat this rank's tensor, sums multiply it, and what is sent to
another rank comes back from there, by copies within this device's memory: real shapes, kernels and memory of one rank
of a large layout, defined values, no communication.
"""

from __future__ import annotations

# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false
# (torch calls these methods by position; its stubs name the parameters differently from method to method)
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # pyright: ignore[reportAttributeAccessIssue]
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.futures import Future


def _done(value: Any) -> Any:
    future: Future = Future()
    future.set_result(value)
    return _create_work_from_future(future)


class EchoGroup(dist.ProcessGroup):
    """The methods that torch.distributed's functions call, under torch 2.13's names and, below, the older ones."""

    def __init__(self, world: int) -> None:
        super().__init__(0, world)  # pyright: ignore[reportCallIssue]
        self.world = world

    def size(self) -> int:
        return self.world

    def rank(self) -> int:
        return 0

    def getBackendName(self) -> str:
        return "echo"

    def _set_group_name(self, name: str) -> None:
        self.own_name = name

    @property
    def group_name(self) -> str:
        return self.own_name

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self.world)
        return _done(tensors)

    def all_gather_single(self, out: Tensor, own: Tensor, opts: Any = None) -> Any:
        out.view(self.world, -1).copy_(own.reshape(1, -1).expand(self.world, -1))
        return _done(out)

    def allgather(self, outs: list[list[Tensor]], own: list[Tensor], opts: Any = None) -> Any:
        for parts, value in zip(outs, own, strict=True):
            for part in parts:
                part.copy_(value)
        return _done(outs)

    def reduce_scatter_single(self, out: Tensor, whole: Tensor, opts: Any = None) -> Any:
        part = whole.reshape(self.world, -1)[0].view_as(out)
        torch.mul(part, self.world, out=out) if opts.reduceOp == dist.ReduceOp.SUM else out.copy_(part)
        return _done(out)

    def all_to_all_single(
        self, out: Tensor, own: Tensor, out_sizes: list[int], in_sizes: list[int], opts: Any = None
    ) -> Any:
        """Every rank sends this one what this one sends to itself."""
        own_part = _parts(own, in_sizes, self.world)[0]
        for part in _parts(out, out_sizes, self.world):
            part.copy_(own_part[: len(part)])
        return _done(out)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        return _done(None)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def all_gather_single_coalesced(self, outs: list[Tensor], own: list[Tensor], opts: Any = None) -> Any:
        for out, value in zip(outs, own, strict=True):
            self.all_gather_single(out, value)
        return _done(outs)

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], wholes: list[Tensor], opts: Any = None) -> Any:
        for out, whole in zip(outs, wholes, strict=True):
            self.reduce_scatter_single(out, whole, opts)
        return _done(outs)

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _parts(whole: Tensor, sizes: list[int], world: int) -> Sequence[Tensor]:
    return whole.split(sizes) if sizes else whole.chunk(world)


def _create(store: Any, rank: int, world: int, timeout: Any) -> EchoGroup:
    assert rank == 0
    return EchoGroup(world)


@contextmanager
def echo_group(world: int) -> Iterator[dist.ProcessGroup]:
    """The default group, of ``world`` ranks of which this process is the first. There must be none before."""
    if "echo" not in dist.Backend.backend_list:
        dist.Backend.register_backend("echo", _create, devices=["cpu", "cuda"])
    dist.init_process_group("echo", store=HashStore(), rank=0, world_size=world)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()

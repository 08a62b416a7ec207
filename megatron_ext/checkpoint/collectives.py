"""How the ranks of a run work on files: a fault of one is raised on all, rank 0 decides, all of them hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.manifest import CheckpointError, Record
from megatron_ext.model import parallel

T = TypeVar("T")


@contextmanager
def on_all_ranks(doing: str) -> Iterator[None]:
    """Leave the block on all ranks or on none: a fault of any rank is raised as a CheckpointError on every rank.

    No collective in the block, unless none of its ranks can fail before it.
    """
    fault, lines = None, []
    try:
        yield
    except Exception as error:
        fault, lines = error, _lines(error)
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, lines, group=parallel.gloo())
    distinct = dict.fromkeys(line for part in everyone for line in part)
    if distinct:
        raise CheckpointError(f"{doing}: " + "\n".join(distinct)) from fault


def on_rank_0(function: Callable[[], T], fault: Callable[[Exception], Exception | None]) -> T:
    """The value that ``function`` returns on rank 0, on every rank.

    What it raises becomes ``fault`` of it on every rank; where that is None, it stays as it is, on rank 0 alone.
    """
    box: list[Any] = [None, None]
    cause = None
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[1], cause = fault(error), error
            if box[1] is None:
                raise
    dist.broadcast_object_list(box, src=0, group=parallel.gloo())
    if box[1] is not None:
        raise box[1] from cause
    return box[0]


def checkpoint_fault(doing: str) -> Callable[[Exception], CheckpointError]:
    """For ``on_rank_0``: whatever goes wrong."""
    return lambda error: CheckpointError(f"{doing}: " + "\n".join(_lines(error)))


def gather_on_rank_0(value: T) -> list[T]:
    """Every rank's value on rank 0, nothing on the others."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, parts, dst=0, group=parallel.gloo())
    return parts or []


def true_on_all_ranks(flag: bool) -> bool:
    """Whether it is; the same answer on every rank."""
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, op=dist.ReduceOp.MIN, group=parallel.gloo())
    return bool(box)


def with_shared_hashing(doing: str, function: Callable[[manifest.Hasher], T]) -> T:
    """The value that ``function`` returns on rank 0, on every rank; all of them hash the files that it asks for."""
    box: list[Any] = [None]
    with on_all_ranks(doing):
        if dist.get_rank() == 0:
            try:
                box[0] = function(_hash_on_all_ranks)
            finally:
                dist.broadcast_object_list([None], src=0, group=parallel.gloo())  # no more
        else:
            while (request := _received()) is not None:
                _hash_share(*request)
    dist.broadcast_object_list(box, src=0, group=parallel.gloo())
    return box[0]


def _hash_on_all_ranks(folder: Path, names: list[str]) -> dict[str, Record]:
    dist.broadcast_object_list([(folder, names)], src=0, group=parallel.gloo())
    parts = _hash_share(folder, names)
    for part in parts:
        if isinstance(part, OSError):
            raise part
    return {name: record for part in parts for name, record in part.items()}


def _hash_share(folder: Path, names: list[str]) -> list[Any]:
    """On rank 0, each rank's records of its share of the files, or the OSError that kept it from them."""
    try:
        own: Any = manifest.record_files(folder, names[dist.get_rank() :: dist.get_world_size()])
    except OSError as error:
        own = error
    return gather_on_rank_0(own)


def _received() -> Any:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, group=parallel.gloo())
    return box[0]


def _lines(error: Exception) -> list[str]:
    if isinstance(error, CheckpointError):
        return str(error).splitlines()
    return [f"rank {dist.get_rank()}: {type(error).__name__}: {error}"]

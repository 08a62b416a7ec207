"""The exchanges of the operators: the only file of this package that calls torch.distributed.

Reductions of token statistics are gathers followed by a sum in rank order, so every rank holds the same bits.
Every function passes its argument through (with the leading axis it promises) when there is one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def all_gather(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[n, ...] -> [world, n, ...]`` in rank order, the same bits on every rank."""
    world = group_size(group)
    if world == 1:
        return value[None]
    gathered = torch.empty((world, *value.shape), dtype=value.dtype, device=value.device)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), value.contiguous(), group=group)
    return gathered


def all_to_all(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[world, n, ...] -> [world, n, ...]``: slice r goes to rank r, slice s came from rank s."""
    if group_size(group) == 1:
        return value
    received = torch.empty_like(value, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, value.contiguous(), group=group)
    return received


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's ``value``, on every rank; ``value`` itself may be overwritten."""
    if group_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


def reduce_scatter(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[world * n, ...] -> [n, ...]``: this rank's tokens of the sum of every rank's ``value``."""
    world = group_size(group)
    if world == 1:
        return value
    own = torch.empty((len(value) // world, *value.shape[1:]), dtype=value.dtype, device=value.device)
    dist.reduce_scatter_tensor(own, value.contiguous(), group=group)
    return own

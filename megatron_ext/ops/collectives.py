"""The exchanges of the operators: the only file of this package that calls torch.distributed.

Reductions over ranks are gathers followed by a sum in rank order, so every rank holds the same bits.
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
    """``[...] -> [world, ...]`` in rank order, the same bits on every rank."""
    if group_size(group) == 1:
        return value[None]
    world = group_size(group)
    gathered = torch.empty((world, *value.shape), dtype=value.dtype, device=value.device)
    dist.all_gather_into_tensor(gathered.flatten(0, 1) if value.ndim else gathered, value.contiguous(), group=group)
    return gathered

"""What context-parallel ranks exchange in a model's passes: keys and values, and the statistics of their tokens.

    all_ranks    keys and values before attention, where Transformer Engine does not exchange them itself
    whole        token statistics after the output layer: from here on every rank has those of whole sequences

So methods, losses and metrics know nothing of it. All ranks of a group compute the same loss from the same statistics,
and each hands the gradient of its own tokens back; the sum over the ranks is the loss's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.model import groups
from megatron_ext.types import ContextSplit


def all_ranks(own: Tensor) -> Tensor:
    """``[S/C, ...] -> [S, ...]``: all ranks' one after the other. Backward adds up the gradients of all ranks."""
    return gather_from_sequence_parallel_region(own, group=groups.context())


def whole(own: Tensor, split: ContextSplit | None) -> Tensor:
    """This rank's statistic of its response tokens to all ranks', ``[T]`` in the order of the whole micro-batch.

    Identical bits on every rank. ``split`` None: the micro-batch is whole.
    """
    return own if split is None or not any(split.counts) else _Whole.apply(own, split, groups.context())  # pyright: ignore[reportReturnType]


class _Whole(torch.autograd.Function):
    """Saves the places of the own tokens in the whole; backward takes their gradients and asks nobody."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, split: ContextSplit, group: dist.ProcessGroup) -> Tensor:
        order, rank = split.order.to(own.device), group.rank()
        assert len(own) == split.counts[rank] and group.size() == len(split.counts)
        padded = own.new_zeros(max(split.counts))
        padded[: len(own)] = own
        gathered = own.new_empty(group.size() * len(padded))
        dist.all_gather_into_tensor(gathered, padded, group=group)
        parts = zip(gathered.view(group.size(), len(padded)), split.counts, strict=True)
        ctx.save_for_backward(order.argsort()[sum(split.counts[:rank]) :][: len(own)])
        return torch.cat([part[:count] for part, count in parts])[order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        [mine] = ctx.saved_tensors
        return gradients[0][mine], None, None

"""How context parallelism cuts a packed micro-batch over C ranks. No process groups.

Each sequence has a length that 2 C divides and is cut into 2 C chunks of equal length; rank r has chunks r and
2 C - 1 - r of every sequence:

    C = 2, a sequence of 8     rank 0: positions 0 1 6 7     rank 1: positions 2 3 4 5

Under a causal mask a chunk from the front and its mirror from the back see as many tokens together on every rank, so
attention costs all of them the same. It is the order of Transformer Engine's packed (``thd``) attention and rotation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_ext.types import ContextSplit, PackedSequences


def own_tokens(starts: Tensor, rank: int, size: int) -> Tensor:
    """``[S/C]`` int64: where in the whole micro-batch the tokens of rank ``rank`` of ``size`` stand, in its order.

    ``starts [B + 1]`` are the whole's cumulative lengths, each length a multiple of 2 C.
    """
    starts = starts.long()
    chunk = starts.diff() // (2 * size)
    begins = torch.stack([starts[:-1] + rank * chunk, starts[:-1] + (2 * size - 1 - rank) * chunk], 1).flatten()
    lengths = chunk.repeat_interleave(2)
    shift = begins - (lengths.cumsum(0) - lengths)  # from an index in the rank's tokens to one in the whole
    return shift.repeat_interleave(lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def cut(whole: PackedSequences, rank: int, size: int) -> PackedSequences:
    """The part of rank ``rank`` of ``size``; a copy, so that what a pass finds out stays with it.

    A response token belongs to the rank that has the position which predicts it.
    """
    assert whole.branch is None and whole.context is None
    holder, index = torch.empty_like(whole.position), torch.empty_like(whole.position)
    for each in range(size):
        own = own_tokens(whole.starts, each, size)
        holder[own], index[own] = each, torch.arange(len(own))
    own, holder_T = own_tokens(whole.starts, rank, size), holder[whole.logit_positions]
    by_rank = holder_T.argsort(stable=True)
    order = torch.empty_like(by_rank)
    order[by_rank] = torch.arange(len(by_rank))
    mine = (holder_T == rank).nonzero()[:, 0]
    return replace(
        whole,
        tokens=whole.tokens[own],
        position=whole.position[own],
        logit_positions=index[whole.logit_positions[mine]],
        targets=whole.targets[mine],
        support=None if whole.support is None else whole.support.select(mine.numpy()),
        routing=None if whole.routing is None else whole.routing[own],
        context=ContextSplit(tuple(torch.bincount(holder_T, minlength=size).tolist()), order),
    )

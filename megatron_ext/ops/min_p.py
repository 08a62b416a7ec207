"""The nucleus by min_p: the tokens of the vocabulary that are likely enough beside the likeliest one.

    p >= min_p max p   <=>   z >= m + log min_p   <=>   x >= theta = max x + log(min_p) / scale          (> : exclusive)

Where it ends is known as soon as the maximum over all ranks is, so nothing is searched for, and no rank sends logits:
one all-gather brings the sums (16 B a token), every rank adds up what it holds above theta, and a second one (32 B)
makes the whole nucleus' sums. A rank looks only into the blocks of columns with the highest maxima where these hold all
that it has of the nucleus, and at all of its columns for the other tokens (flat distributions).

theta is rounded to the dtype of the arithmetic once and compared with logits everywhere, in the backward too. A token
whose probability equals min_p max p to that rounding may fall on either side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_ext.ops.candidates import Blocks, positions_above
from megatron_ext.ops.collectives import all_gather
from megatron_ext.ops.nucleus import AtTheta, apply_rule, exchange
from megatron_ext.ops.options import NucleusRule
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.stats import GlobalStats

BLOCK = 1 << 19  # logits looked at at once


def cutoff(maximum: Tensor, scale: Tensor, min_p: float) -> Tensor:
    """Theta ``[T, 1]`` in fp64, a number of the dtype of ``scale``; ``maximum`` ``[T, 1]`` is over all ranks."""
    return (maximum.double() + math.log(min_p) / scale.double()).to(scale.dtype).double()


def exchange_nucleus(
    logits: Tensor, sums: Tensor, blocks: Blocks | None, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> GlobalStats:
    """The whole vocabulary's statistics with the nucleus, from this rank's ``logits`` ``[T, shard.real]`` and packed
    ``ShardStats`` ``[T, 4]``; ``blocks`` are those of its columns with the highest maxima."""
    assert rule.min_p is not None
    stats = exchange(sums, scale, shard)
    theta = cutoff(stats.maximum, scale, rule.min_p)
    own = _sums_from(theta, logits, blocks, stats.maximum, scale.double())
    mass, moment, above, equal = all_gather(own, shard.group).sum(0).split(1, dim=1)
    return stats._replace(nucleus=apply_rule(stats, theta, AtTheta(mass, moment, above, equal), scale.double(), rule))


def _sums_from(theta: Tensor, logits: Tensor, blocks: Blocks | None, maximum: Tensor, scale: Tensor) -> Tensor:
    """This rank's part of ``AtTheta`` ``[T, 4]`` in fp64: sum e^d and d e^d above theta, counts above and at it."""
    T, V = logits.shape
    own = torch.zeros((T, 4), dtype=torch.float64, device=logits.device)
    within = torch.zeros(T, dtype=torch.bool, device=logits.device)
    if blocks is not None:
        within = (theta > blocks.maxima.amin(-1, keepdim=True))[:, 0]
    few = within.nonzero()[:, 0]
    if blocks is not None and len(few):
        token, column = positions_above(logits, few, blocks, theta, True)
        x, at = logits[token, column].double(), theta[token, 0]
        own.index_add_(0, token, torch.stack(_terms(x, at, maximum[token, 0], scale[token, 0]), 1))
    for tokens in (~within).nonzero()[:, 0].split(max(1, BLOCK // max(V, 1))):
        terms = _terms(logits[tokens].double(), theta[tokens], maximum[tokens], scale[tokens])
        own[tokens] = torch.stack([term.sum(-1) for term in terms], 1)
    return own


def _terms(x: Tensor, theta: Tensor, maximum: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """What each logit adds to the four sums."""
    d, above = ((x - maximum) * scale).clamp_min(-1e30), x > theta
    e = torch.where(above, d.exp(), 0)
    return e, torch.where(above, e * d, 0), above.double(), ((x == theta) & (x > -torch.inf)).double()

"""The support of a sampler that kept the top of each token's distribution, computed from vocabulary-sharded logits.

In this order: temperature; min_p drops tokens less likely than min_p times the likeliest; top_k keeps the k likeliest;
top_p keeps the likeliest of what is left, renormalised, up to the one at which the mass reaches top_p. Tokens that tie
with the last one kept are kept, by top_k as by top_p: what is kept is everything from one logit, theta, on.

Exchange: each rank's highest logits (candidates.py) go to a token's owner rank, which decides theta where they prove
it, and theta returns to all, about 1 KB a token (nucleus.py). For the tokens left (flat distributions) the MANY highest
logits of every rank are gathered, or all of them where those do not do, and decided by the same lines. Then the ranks'
ids are gathered, 4 B each. Masses are fp64.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops import logit_passes
from megatron_ext.ops.candidates import Blocks, Candidates, in_nucleus, merge_candidates, positions_above
from megatron_ext.ops.collectives import all_gather, group_size
from megatron_ext.ops.nucleus import ask_owners, merge
from megatron_ext.ops.options import NUM_CANDIDATES, inverse_temperature
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.sorting import highest
from megatron_ext.ops.support import Support

MOST_CANDIDATES = 1024  # for a larger top_k more logits are gathered
MANY = 8192  # highest logits of a rank that are gathered for a token that the candidates do not resolve
GATHERED = 1 << 22  # logits, of all ranks, gathered at once
BLOCK = 1 << 22  # logits compared at once


class Restriction(NamedTuple):
    """What a sampler keeps. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 restrict nothing."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@torch.no_grad()
def sampling_support(
    logits: Tensor,
    shard: VocabShard | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Support:
    """The tokens that a sampler with these settings keeps of ``logits``, the same on every rank of the group.

    Without gradient. Rows are empty, the whole vocabulary, where nothing restricts and where a logit is NaN.

    Args:
        logits: ``[T, shard.width]`` bf16, fp32 or fp64, raw (before temperature).
        shard: the columns this rank holds; None: all of the vocabulary.
        temperature: a positive number, or ``[T]``.
        top_k: how many tokens are kept, and those that tie with the last; 0: all.
        top_p: the mass that is kept of what the other two leave, in (0, 1].
        min_p: the least probability, as a share of the likeliest token's, in [0, 1].

    Raises:
        ValueError: shapes or numbers that do not fit.
    """
    shard = VocabShard.for_vocab(logits.shape[-1]) if shard is None else shard
    if logits.ndim != 2 or logits.shape[1] != shard.width:
        raise ValueError(f"sampling_support: logits are {list(logits.shape)}, expected [T, {shard.width}] for {shard}")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"sampling_support: temperature is {temperature}, expected more than 0")
    rule = checked_restriction("sampling_support", top_k, top_p, min_p)
    if rule == Restriction() or not len(logits):
        return Support.unrestricted(len(logits), logits.device)
    scale = inverse_temperature(temperature, len(logits), logits.new_empty(0, dtype=torch.float64))
    theta, blocks = _last_kept(logits, scale, shard, rule)
    return _gather_ids(*_positions(logits[:, : shard.real], theta, blocks), len(logits), shard)


def checked_restriction(caller: str, top_k: int, top_p: float, min_p: float) -> Restriction:
    """Raises ValueError, naming the caller, for numbers out of range."""
    if top_k < 0:
        raise ValueError(f"{caller}: top_k is {top_k}, expected 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"{caller}: top_p is {top_p}, expected a number in (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{caller}: min_p is {min_p}, expected a number in [0, 1]")
    return Restriction(top_k, top_p, min_p)


def _last_kept(logits: Tensor, scale: Tensor, shard: VocabShard, rule: Restriction) -> tuple[Tensor, Blocks | None]:
    """Theta ``[T, 1]`` of every token, and where this rank's highest logits are."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    by_mass = rule.top_k == 0 and rule.min_p == 0  # then candidates may end where they hold the mass
    sums, candidates = logit_passes.summarise(
        logits,
        torch.full((len(logits), 1), -1, device=logits.device),
        scale.to(dtype),
        shard.real,
        moment=False,
        num_candidates=max(NUM_CANDIDATES, min(rule.top_k, MOST_CANDIDATES) + 1),
        tail=(1 - rule.top_p) / (2 * group_size(shard.group)) if by_mass else 0.0,
    )
    assert candidates is not None
    decided = ask_owners(sums, candidates, scale, shard, partial(_decide, rule=rule), columns=3)
    theta, proven, total = (part.clone() for part in decided.split(1, dim=1))
    for k in (min(MANY, shard.width), shard.width):
        left = (proven[:, 0] == 0).nonzero()[:, 0]  # the same on every rank
        for tokens in left.split(max(1, GATHERED // (k * group_size(shard.group)))) if len(left) else ():
            found = _of_highest(logits[tokens], k, total[tokens], scale[tokens], shard, rule)
            theta[tokens], proven[tokens] = (value.to(dtype) for value in found)
    return theta, candidates.blocks


def _decide(sums: Tensor, candidates: list[Candidates], scale: Tensor, *, rule: Restriction) -> Tensor:
    """Theta, whether it is proven, and the mass of the whole vocabulary, of the owner's tokens ``[n, 3]`` fp64."""
    stats = merge(sums, scale)
    logit, count = merge_candidates(candidates, [part[:, :1] for part in sums])
    floor = torch.stack([part.floor for part in candidates]).amax(0)
    found = _theta(logit.double(), count.double(), floor.double(), stats.total, scale, rule)
    return torch.cat([*found, stats.total], 1)


def _of_highest(
    logits: Tensor, k: int, total: Tensor, scale: Tensor, shard: VocabShard, rule: Restriction
) -> tuple[Tensor, Tensor]:
    """Theta ``[n, 1]`` and whether it is proven, from the k highest logits of every rank."""
    own = logits.to(total.dtype, copy=True)
    own[:, shard.real :] = -torch.inf
    own = highest(own, k)
    floor = own[:, -1:] if k < shard.width else torch.full_like(total, -torch.inf)
    ranks = all_gather(torch.cat([own, floor], 1), shard.group)
    found = ranks[..., :-1].movedim(0, 1).flatten(1)
    found = found if len(ranks) == 1 else highest(found, found.shape[1])
    count = (found > -torch.inf).double()
    return _theta(found.double(), count, ranks[..., -1:].amax(0).double(), total.double(), scale, rule)


def _theta(
    logit: Tensor, count: Tensor, floor: Tensor, total: Tensor, scale: Tensor, rule: Restriction
) -> tuple[Tensor, Tensor]:
    """The lowest logit kept ``[n, 1]``, and 1 where it is proven, else 0. fp64.

    ``logit`` ``[n, E]`` descends from the token's highest and ``count`` says how many tokens have each; every logit
    above ``floor`` ``[n, 1]`` is there. ``total`` ``[n, 1]`` is the sum of e^((x - max) * scale) over the vocabulary.
    """
    last = logit.shape[1] - 1
    least = math.log(rule.min_p) if rule.min_p else -torch.inf
    maximum = logit[:, :1]
    d = ((logit - maximum) * scale).clamp_min(-1e30)
    kept = (count > 0) & (d >= least)
    proven = (floor == -torch.inf) | ((floor - maximum) * scale < least)
    if rule.top_k:
        before = (count.cumsum(-1) < rule.top_k).sum(-1, keepdim=True)
        kth = torch.where(before <= last, logit.gather(1, before.clamp_max(last)), -torch.inf)
        kept &= logit >= kth
        proven |= kth > floor
    if rule.top_p < 1:
        mass = torch.where(kept, count * d.exp(), 0)
        everything = total if rule.top_k == 0 and rule.min_p == 0 else mass.sum(-1, keepdim=True)
        before = (mass.cumsum(-1) < rule.top_p * everything).sum(-1, keepdim=True)
        cutoff = torch.where(before <= last, logit.gather(1, before.clamp_max(last)), -torch.inf)
        kept &= logit >= cutoff
        if rule.top_k == 0 and rule.min_p == 0:
            proven |= cutoff > floor
    theta = torch.where(kept, logit, torch.inf).amin(-1, keepdim=True)
    return theta, proven.to(theta.dtype)


def _positions(logits: Tensor, theta: Tensor, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
    """Token and column of everything that this rank holds from theta on, in order."""
    T, V = logits.shape
    if blocks is None:
        within = torch.zeros(T, dtype=torch.bool, device=logits.device)
    else:
        within = (theta > blocks.maxima.amin(-1, keepdim=True))[:, 0]
    found = []
    if blocks is not None and within.any():
        found.append(positions_above(logits, within.nonzero()[:, 0], blocks, theta, True))
    for tokens in (~within).nonzero()[:, 0].split(max(1, BLOCK // max(V, 1))):
        row, column = in_nucleus(logits[tokens], theta[tokens], True).nonzero(as_tuple=True)
        found.append((tokens[row], column))
    token, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = (token * V + column).argsort()
    return token[order], column[order]


def _gather_ids(token: Tensor, column: Tensor, T: int, shard: VocabShard) -> Support:
    """The supports of all ranks' ids: those of a token lie in rank order, which is that of the vocabulary."""
    sizes = all_gather(torch.bincount(token, minlength=T), shard.group)  # [world, T]
    starts = torch.nn.functional.pad(sizes.sum(0).cumsum(0), (1, 0))
    longest = int(sizes.sum(1).max())
    own = torch.nn.functional.pad((column + shard.start).int(), (0, longest - len(column)))
    ids = torch.empty(int(starts[-1]), dtype=torch.int64, device=token.device)
    first = starts[:-1] + sizes.cumsum(0) - sizes  # [world, T]: where a rank's ids of a token begin
    for part, size, begin in zip(all_gather(own, shard.group), sizes, first, strict=True):
        n = int(size.sum())
        within = torch.arange(n, device=token.device) - (size.cumsum(0) - size).repeat_interleave(size, output_size=n)
        ids[begin.repeat_interleave(size, output_size=n) + within] = part[:n].long()
    return Support(ids, starts)

"""Which tokens of the vocabulary form the nucleus, decided once for all ranks from the candidates, and the sums inside.

Exchange, forward only: one all-to-all brings the sums and candidates of a token to one owner rank, which merges them,
walks down to the cutoff token and resolves it if no rank can have left out a logit above the cutoff; one all-gather
returns the result. Unresolved ones (flat distributions, top_p near 1) take the fallback, ``search``: local sort, then a
search for the cutoff token's key with all ranks' masses, four bits a round. Masses are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.candidates import Candidates, merge_candidates
from megatron_ext.ops.collectives import all_gather, all_to_all, group_rank, group_size
from megatron_ext.ops.options import NucleusRule
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.sorting import ascending, from_order_key, order_key
from megatron_ext.ops.stats import GlobalStats, NucleusStats, ShardStats

Decide = Callable[[Tensor, list[Candidates], Tensor], Tensor]
"""Packed ``ShardStats`` ``[world, n, 4]``, the ranks' candidates and the scale of n tokens -> ``[n, columns]`` fp64."""

PIVOTS = 15  # keys compared in one round: four bits of the cutoff token's key
BLOCK = 1 << 19  # candidates, or logits, handled at once
LOWEST = (
    -700.0
)  # below it e^d counts as e^LOWEST, nothing beside a sum; torch's exp is 50 times slower on what underflows


def merge(sums: Tensor, scale: Tensor) -> GlobalStats:
    """The ranks' packed ``ShardStats`` ``[world, T, 4]`` to the whole vocabulary's, in fp64."""
    shards, scale = ShardStats.unpack(sums.double()), scale.double()
    maximum = shards.maximum.amax(0)
    shift = ((shards.maximum - maximum) * scale).clamp_min(LOWEST)
    weight = shift.exp()
    total = (shards.total * weight).sum(0)
    entropy = total.log() - ((shards.moment + shards.total * shift) * weight).sum(0) / total
    return GlobalStats(maximum, total, entropy, shards.target.amax(0))


def exchange(sums: Tensor, scale: Tensor, shard: VocabShard) -> GlobalStats:
    """Without a nucleus: one all-gather of 16 B a token (32 in fp64)."""
    return merge(all_gather(sums, shard.group), scale)


def exchange_candidates(
    sums: Tensor, candidates: Candidates, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> GlobalStats:
    """With a nucleus: candidates to the owners, results to everybody."""
    return GlobalStats.unpack(ask_owners(sums, candidates, scale, shard, partial(_decide, rule=rule), columns=8))


def ask_owners(
    sums: Tensor, candidates: Candidates, scale: Tensor, shard: VocabShard, decide: Decide, *, columns: int
) -> Tensor:
    """``[T, columns]`` in the dtype of ``sums``, on every rank: what each token's owner decides of all ranks' parts."""
    T, world = len(sums), group_size(shard.group)
    own = -(-T // world)
    payload = torch.cat([_words(sums), _words(candidates.floor), _words(candidates.entries)], 1)
    payload = torch.nn.functional.pad(payload, (0, 0, 0, own * world - T))
    payload = all_to_all(payload.unflatten(0, (world, own)), shard.group)
    first = group_rank(shard.group) * own
    scale = torch.nn.functional.pad(scale, (0, 0, 0, own * world - T), value=1)[first : first + own]
    step = max(1, BLOCK // (candidates.entries.shape[1] * world))
    results = [
        decide(*_unpacked(payload[:, i : i + step], sums.dtype, candidates.entries.dtype), scale[i : i + step])
        for i in range(0, own, step)
    ]
    result = torch.cat(results) if results else sums.new_empty((0, columns))
    return all_gather(result.to(sums.dtype), shard.group).flatten(0, 1)[:T]


def _words(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32)


def _unpacked(payload: Tensor, dtype: torch.dtype, entries: torch.dtype) -> tuple[Tensor, list[Candidates]]:
    """Packed ``ShardStats`` ``[world, n, 4]`` and the ranks' candidates from the words ``[world, n, ...]``."""
    words = 2 if dtype == torch.float64 else 1
    sums = payload[..., : 4 * words].contiguous().view(dtype)
    floor = payload[..., 4 * words : 5 * words].contiguous().view(dtype)
    candidates = payload[..., 5 * words :].contiguous().view(entries)
    return sums, [Candidates(candidates[r], floor[r]) for r in range(len(payload))]


def _decide(sums: Tensor, candidates: list[Candidates], scale: Tensor, *, rule: NucleusRule) -> Tensor:
    """The packed ``GlobalStats`` of the owner's tokens ``[n, 8]``, in fp64."""
    stats, scale = merge(sums, scale), scale.double()
    maxima = [part[:, :1] for part in sums]
    logit, count = merge_candidates(candidates, maxima)
    d = ((logit - stats.maximum) * scale).clamp_min(LOWEST)
    mass = count * d.exp()
    before = (mass.cumsum(-1) < rule.limit * stats.total).sum(-1, keepdim=True)
    theta = logit.gather(1, before.clamp_max(logit.shape[1] - 1))
    floor = torch.stack([part.floor for part in candidates]).amax(0)
    resolved = (before < logit.shape[1]) & (theta > floor)
    equal = torch.where(logit == theta, count, 0).sum(-1, keepdim=True)
    above = (torch.where(logit > theta, v, 0).sum(-1, keepdim=True) for v in (mass, mass * d, count))
    nucleus = apply_rule(stats, theta, AtTheta(*above, equal=equal.double()), scale, rule)
    nucleus = nucleus._replace(size=torch.where(resolved | stats.total.isnan(), nucleus.size, -1))
    return stats._replace(nucleus=nucleus).pack(torch.float64)


class AtTheta(NamedTuple):
    """Sums over the logits above theta, and how many equal it, ``[n, 1]`` each."""

    mass: Tensor  # sum e^d
    moment: Tensor  # sum d e^d
    above: Tensor
    equal: Tensor


def apply_rule(stats: GlobalStats, theta: Tensor, sums: AtTheta, scale: Tensor, rule: NucleusRule) -> NucleusStats:
    """The nucleus that ends at theta ``[n, 1]``."""
    d = ((theta.double() - stats.maximum) * scale).clamp_min(LOWEST)
    one = d.exp()
    keep = sums.equal if rule.keep_equal else torch.zeros_like(sums.equal)
    mass = sums.mass + keep * one
    moment = sums.moment + keep * one * d
    size = sums.above + keep
    some = (size > 0) & ~stats.total.isnan()
    safe = torch.where(some, mass, 1)
    entropy = torch.where(some, safe.log() - moment / safe, torch.where(stats.total.isnan(), stats.total, 0))
    return NucleusStats(theta, mass, entropy, size)


def search(
    logits: Tensor, unresolved: Tensor, stats: GlobalStats, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> GlobalStats:
    """``stats`` with the ``unresolved`` tokens ``[n]`` decided by the search for their cutoff token's key.

    ``logits`` ``[T, shard.real]`` are all tokens'. Collectives: per block of tokens, one for the range, one a round (4
    for bf16, 8 for fp32) and one for the sums.
    """
    assert stats.nucleus is not None
    nucleus = NucleusStats(*(value.clone() for value in stats.nucleus))
    for tokens in unresolved.split(max(1, BLOCK // shard.width)):
        part = GlobalStats.unpack(stats._replace(nucleus=None).pack(torch.float64)[tokens])
        found = _search_block(logits[tokens], part, scale[tokens].double(), shard, rule)
        for whole, value in zip(nucleus, found, strict=True):
            whole[tokens] = value.to(whole.dtype)
    return stats._replace(nucleus=nucleus)


def _search_block(x: Tensor, stats: GlobalStats, scale: Tensor, shard: VocabShard, rule: NucleusRule) -> NucleusStats:
    dtype, group = (torch.float64 if x.dtype == torch.float64 else torch.float32), shard.group
    unit, rounds = (1 << 16, 4) if x.dtype == torch.bfloat16 else (1, 16 if x.dtype == torch.float64 else 8)
    V = x.shape[1]
    x = ascending(x.to(dtype))
    d = (x - stats.maximum.to(dtype)).mul_(scale.to(dtype)).clamp_min_(-1e30)
    e = d.exp()
    prefix = e.cumsum(1, dtype=torch.float64)

    def mass_from(column: Tensor) -> Tensor:
        """The mass at and after columns ``[n, k]`` of the sorted logits."""
        if not V:
            return torch.zeros_like(column, dtype=torch.float64)
        before = prefix.gather(1, (column - 1).clamp_min(0))
        return prefix[:, -1:] - torch.where(column > 0, before, 0)

    first = (x == -torch.inf).sum(-1, keepdim=True).clamp_max(max(V - 1, 0))
    lowest = x.gather(1, first) if V else torch.full_like(stats.total, torch.inf, dtype=dtype)
    lowest = torch.where(lowest > -torch.inf, lowest, torch.inf)
    low = torch.div(order_key(all_gather(lowest, group).amin(0)), unit, rounding_mode="floor")
    high = torch.div(order_key(torch.full_like(lowest, torch.inf)), unit, rounding_mode="floor")
    for _ in range(rounds if rule.top_p < 1 else 0):
        step = (high >> 4) - (low >> 4) + ((high & 15) - (low & 15) + 15 >> 4)  # (high - low) / 16 rounded up
        pivots = from_order_key(torch.cat([low + step * i for i in range(1, PIVOTS + 1)], 1) * unit, dtype)
        above = mass_from(torch.searchsorted(x, pivots))
        reached = all_gather(above, group).sum(0) >= rule.limit * stats.total
        reached = reached.sum(-1, keepdim=True)
        low, high = low + step * reached, torch.where(reached < PIVOTS, low + step * (reached + 1), high)
    theta = from_order_key(low * unit, dtype)
    start, end = torch.searchsorted(x, theta), torch.searchsorted(x, theta, right=True)
    e.mul_(x > theta)
    mass, moment = e.sum(-1, keepdim=True, dtype=torch.float64), e.mul_(d).sum(-1, keepdim=True, dtype=torch.float64)
    ranks = all_gather(torch.cat([mass, moment, V - end, end - start], 1), group)  # [world, n, 4]
    sums = AtTheta(*ranks[..., :3].sum(0).split(1, dim=1), equal=ranks[..., 3:].sum(0))
    return apply_rule(stats, theta, sums, scale, rule)

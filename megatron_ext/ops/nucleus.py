"""Which tokens form the nucleus, decided once for all ranks from the windows, and the sums inside it.

Exchange, forward only: one all-to-all brings a row's sums and windows to one owner rank, which merges them, walks down
to the crossing and certifies that nothing above it was missing from any window; one all-gather returns the result.
Rows it cannot certify (flat rows, top_p near 1) are decided exactly by ``search``: local sort, then a search for the
crossing's key with all ranks' masses, four bits a round. Masses are fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.ops.candidates import Candidates, ascending, from_order_key, merge_candidates, order_key
from megatron_ext.ops.collectives import all_gather, all_to_all, group_rank, group_size
from megatron_ext.ops.options import NucleusRule
from megatron_ext.ops.shard import VocabShard

PIVOTS = 15  # keys weighed in one round: four bits of the crossing's key
BLOCK = 1 << 19  # window entries, or logits, handled at once


@dataclass(frozen=True)
class GlobalStats:
    """What every rank knows of every row after the exchange, ``[T, 1]`` each; the last four only with a nucleus.

    ``total`` and ``mass`` are relative to ``maximum``: sums of e^((x - maximum) * scale). ``size`` is -1 for a row that
    was not certified.
    """

    maximum: Tensor
    total: Tensor
    entropy: Tensor
    target: Tensor  # the target's logit, minus infinity where no rank has it
    theta: Tensor | None = None
    mass: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    size: Tensor | None = None


def merge(sums: Tensor, scale: Tensor) -> GlobalStats:
    """``[world, T, 4]`` sums of the shards (rows.summarise) to the whole vocabulary's, in fp64."""
    sums, scale = sums.double(), scale.double()
    shard_maximum, total, moment, target = sums.split(1, dim=-1)
    maximum = shard_maximum.amax(0)
    shift = ((shard_maximum - maximum) * scale).clamp_min(-1e30)
    weight = shift.exp()
    S = (total * weight).sum(0)
    return GlobalStats(maximum, S, S.log() - ((moment + total * shift) * weight).sum(0) / S, target.amax(0))


def exchange(sums: Tensor, scale: Tensor, shard: VocabShard) -> GlobalStats:
    """Without a nucleus: one all-gather of 16 B a row (32 in fp64)."""
    return merge(all_gather(sums, shard.group), scale)


def exchange_candidates(
    sums: Tensor, candidates: Candidates, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> GlobalStats:
    """With a nucleus: windows to the owners, results to everybody."""
    T, world = len(sums), group_size(shard.group)
    own = -(-T // world)
    payload = torch.cat([_words(sums), _words(candidates.floor), _words(candidates.entries)], 1)
    payload = torch.nn.functional.pad(payload, (0, 0, 0, own * world - T))
    payload = all_to_all(payload.unflatten(0, (world, own)), shard.group)
    first = group_rank(shard.group) * own
    scale = torch.nn.functional.pad(scale, (0, 0, 0, own * world - T), value=1)[first : first + own]
    step = max(1, BLOCK // (candidates.entries.shape[1] * world))
    results = [
        _decide(*_unpacked(payload[:, i : i + step], sums.dtype, candidates.entries.dtype), scale[i : i + step], rule)
        for i in range(0, own, step)
    ]
    result = torch.cat(results) if results else torch.empty((0, 8), dtype=torch.float64, device=sums.device)
    result = all_gather(result.to(sums.dtype), shard.group).flatten(0, 1)[:T]
    return GlobalStats(*result.split(1, dim=1))


def _words(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32)


def _unpacked(payload: Tensor, dtype: torch.dtype, entries: torch.dtype) -> tuple[Tensor, list[Candidates]]:
    """Sums ``[world, n, 4]`` and the ranks' windows from the words ``[world, n, ...]``."""
    words = 2 if dtype == torch.float64 else 1
    sums = payload[..., : 4 * words].contiguous().view(dtype)
    floor = payload[..., 4 * words : 5 * words].contiguous().view(dtype)
    candidates = payload[..., 5 * words :].contiguous().view(entries)
    return sums, [Candidates(candidates[r], floor[r]) for r in range(len(payload))]


def _decide(sums: Tensor, candidates: list[Candidates], scale: Tensor, rule: NucleusRule) -> Tensor:
    """The columns of ``GlobalStats`` for the owner's rows ``[n, 8]``, in fp64."""
    rows, scale = merge(sums, scale), scale.double()
    maxima = [part[:, :1] for part in sums]
    logit, count = merge_candidates(candidates, maxima)
    d = ((logit - rows.maximum) * scale).clamp_min(-1e30)
    mass = count * d.exp()
    before = (mass.cumsum(-1) < rule.limit * rows.total).sum(-1, keepdim=True)
    theta = logit.gather(1, before.clamp_max(logit.shape[1] - 1))
    floor = torch.stack([part.floor for part in candidates]).amax(0)
    resolved = (before < logit.shape[1]) & (theta > floor)
    above = logit > theta
    sums_above = torch.stack([torch.where(above, v, 0).sum(-1) for v in (mass, mass * d, count)], -1)
    equal = torch.where(logit == theta, count, 0).sum(-1, keepdim=True)
    inside = close(rows, theta, sums_above, equal.double(), scale, rule)
    size = torch.where(resolved | rows.total.isnan(), inside[:, 2:], -1)
    return torch.cat([rows.maximum, rows.total, rows.entropy, rows.target, theta.double(), inside[:, :2], size], 1)


def close(rows: GlobalStats, theta: Tensor, above: Tensor, equal: Tensor, scale: Tensor, rule: NucleusRule) -> Tensor:
    """Apply the rule at theta: ``[n, 3]`` of (mass, entropy, size).

    ``above`` ``[n, 3]``: mass, sum of mass * d and tokens above theta; ``equal`` ``[n, 1]``: tokens equal to it.
    """
    d = ((theta.double() - rows.maximum) * scale).clamp_min(-1e30)
    one = d.exp()
    keep = equal if rule.keep_equal else torch.zeros_like(equal)
    mass = above[:, :1] + keep * one
    moment = above[:, 1:2] + keep * one * d
    size = above[:, 2:3] + keep
    some = (size > 0) & ~rows.total.isnan()
    safe = torch.where(some, mass, 1)
    entropy = torch.where(some, safe.log() - moment / safe, torch.where(rows.total.isnan(), rows.total, 0))
    return torch.cat([mass, entropy, size], 1)


def search(
    logits: Tensor, unresolved: Tensor, rows: GlobalStats, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> GlobalStats:
    """``rows`` with the uncertified rows ``unresolved`` ``[n]`` decided by the search for their crossing's key.

    ``logits`` ``[T, shard.real]`` are all rows'. Collectives: per block of rows, one for the range, one a round (4 for
    bf16, 8 for fp32) and one for the sums.
    """
    assert rows.theta is not None and rows.mass is not None and rows.nucleus_entropy is not None
    assert rows.size is not None
    theta, mass, entropy, size = (v.clone() for v in (rows.theta, rows.mass, rows.nucleus_entropy, rows.size))
    for index in unresolved.split(max(1, BLOCK // shard.width)):
        x = logits[index]
        part = GlobalStats(*(v[index].double() for v in (rows.maximum, rows.total, rows.entropy, rows.target)))
        found, closed = _search_block(x, part, scale[index].double(), shard, rule)
        theta[index] = found.to(theta.dtype)
        for value, column in zip((mass, entropy, size), closed.split(1, dim=1), strict=True):
            value[index] = column.to(value.dtype)
    return GlobalStats(rows.maximum, rows.total, rows.entropy, rows.target, theta, mass, entropy, size)


def _search_block(
    x: Tensor, rows: GlobalStats, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> tuple[Tensor, Tensor]:
    dtype, group = (torch.float64 if x.dtype == torch.float64 else torch.float32), shard.group
    unit, rounds = (1 << 16, 4) if x.dtype == torch.bfloat16 else (1, 16 if x.dtype == torch.float64 else 8)
    V = x.shape[1]
    x = ascending(x.to(dtype))
    d = (x - rows.maximum.to(dtype)).mul_(scale.to(dtype)).clamp_min_(-1e30)
    e = d.exp()
    prefix = e.cumsum(1, dtype=torch.float64)

    def from_position(position: Tensor) -> Tensor:
        """The mass at and after positions ``[n, k]`` of the sorted row."""
        if not V:
            return torch.zeros_like(position, dtype=torch.float64)
        before = prefix.gather(1, (position - 1).clamp_min(0))
        return prefix[:, -1:] - torch.where(position > 0, before, 0)

    first = (x == -torch.inf).sum(-1, keepdim=True).clamp_max(max(V - 1, 0))
    lowest = x.gather(1, first) if V else torch.full_like(rows.total, torch.inf, dtype=dtype)
    lowest = torch.where(lowest > -torch.inf, lowest, torch.inf)
    low = torch.div(order_key(all_gather(lowest, group).amin(0)), unit, rounding_mode="floor")
    high = torch.div(order_key(torch.full_like(lowest, torch.inf)), unit, rounding_mode="floor")
    for _ in range(rounds if rule.top_p < 1 else 0):
        step = (high >> 4) - (low >> 4) + ((high & 15) - (low & 15) + 15 >> 4)  # (high - low) / 16 rounded up
        pivots = from_order_key(torch.cat([low + step * i for i in range(1, PIVOTS + 1)], 1) * unit, dtype)
        above = from_position(torch.searchsorted(x, pivots))
        reached = all_gather(above, group).sum(0) >= rule.limit * rows.total
        reached = reached.sum(-1, keepdim=True)
        low, high = low + step * reached, torch.where(reached < PIVOTS, low + step * (reached + 1), high)
    theta = from_order_key(low * unit, dtype)
    start, end = torch.searchsorted(x, theta), torch.searchsorted(x, theta, right=True)
    e.mul_(x > theta)
    sums = e.sum(-1, keepdim=True, dtype=torch.float64), e.mul_(d).sum(-1, keepdim=True, dtype=torch.float64)
    local = torch.cat([*sums, V - end, end - start], 1)
    merged = all_gather(local, group)  # [world, n, 4]
    return theta, close(rows, theta, merged[..., :3].sum(0), merged[..., 3:].sum(0), scale, rule)

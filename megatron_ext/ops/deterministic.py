"""Statistics whose bits depend on no sharding, alignment, number of threads or order: for ``deterministic=True``.

Nothing here adds floats in an order that a layout decides:

- e^d is made of multiplications, additions and integer shifts alone, which IEEE 754 rounds in one way wherever an
  element lies. torch's own exponential answers differently in the last elements of a tensor.
- sums over the vocabulary are of integers: with u = 2^-(62 - ceil(log2 V)), e^d in [0, 1] counts as round(e^d / u).
  Integers may be added in any order. For V = 151,936, u = 2^-44: the sum, at least 1, is off by at most V u / 2 = 4e-9,
  and typically by 1e-11.

The maximum over the vocabulary is exchanged first, then the sums (one all-gather each); with a nucleus every token is
searched, as the fallback of nucleus.py does it, with masses that are integers too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.candidates import in_nucleus
from megatron_ext.ops.collectives import all_gather
from megatron_ext.ops.logit_passes import TokenGradient
from megatron_ext.ops.min_p import cutoff
from megatron_ext.ops.nucleus import PIVOTS, AtTheta, apply_rule
from megatron_ext.ops.options import NucleusRule, Options
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.sorting import ascending, from_order_key, order_key
from megatron_ext.ops.stats import GlobalStats, NucleusStats

BLOCK = 1 << 16  # elements worked on at once


class _Float(NamedTuple):
    """A floating-point format, and how many terms of e^x's series it takes on |x| <= log(2) / 2."""

    integer: torch.dtype
    mantissa_bits: int
    bias: int
    terms: int


_FLOATS = {torch.float32: _Float(torch.int32, 23, 127, 8), torch.float64: _Float(torch.int64, 52, 1023, 14)}


def power_of_two(y: Tensor) -> Tensor:
    """2^y for y <= 0, 0 below the smallest normal number; the same bits for the same y, wherever it lies.

    With n = round(y) the series of 2^(y - n) in Horner's form, times 2^n set in the exponent's bits.
    """
    form = _FLOATS[y.dtype]
    y = y.clamp_min(-form.bias)
    n = y.round()
    f = (y - n).mul_(math.log(2))
    series = torch.full_like(y, 1 / math.factorial(form.terms - 1))
    for k in range(form.terms - 2, -1, -1):
        series.mul_(f).add_(1 / math.factorial(k))
    power = n.nan_to_num_(nan=0).to(form.integer).add_(form.bias).bitwise_left_shift_(form.mantissa_bits).view(y.dtype)
    return series.mul_(power)


def exponential(x: Tensor) -> Tensor:
    """e^x for x <= 0, by :func:`power_of_two`."""
    return power_of_two(x * (1 / math.log(2)))


def global_stats(logits: Tensor, column: Tensor, scale: Tensor, options: Options) -> GlobalStats:
    """The statistics of every token over the whole vocabulary ``[T, 1]`` each, in fp64, the same bits on every rank.

    ``logits`` ``[T, W]`` with ``column`` ``[T, 1]``, the target's in this shard or -1, and ``scale`` ``[T, 1]``.
    """
    shard, rule, dtype = options.shard, options.rule, scale.dtype
    x, unit = logits[:, : shard.real], _unit(shard)
    maximum, target = torch.full_like(scale, -torch.inf), torch.full_like(scale, -torch.inf)
    if shard.real:
        maximum = x.amax(-1, keepdim=True).to(dtype)
        at_target = x.gather(1, column.clamp_min(0)).to(dtype)
        target = torch.where(column >= 0, at_target, -torch.inf)
    highest = all_gather(torch.cat([maximum, target], 1), shard.group).amax(0)
    maximum, target = (value.contiguous() for value in highest.split(1, dim=1))
    base = torch.where(maximum > -torch.inf, maximum, 0)
    sums = torch.zeros((len(x), 2), dtype=torch.int64, device=x.device)
    for tokens in _blocks(x):
        y, e = _weights(x[tokens], base[tokens], scale[tokens])
        sums[tokens, 0] = _counts(e, unit).sum(-1)
        if options.moment:
            sums[tokens, 1] = _counts(e.mul_(y), unit).sum(-1)
    total, moment = (_amount(value, unit) for value in all_gather(sums, shard.group).sum(0).split(1, dim=1))
    total = torch.where(base.isfinite(), total, torch.nan)  # a NaN or an infinite logit stays with its token
    entropy = total.log() - moment * math.log(2) / total
    stats = GlobalStats(maximum.double(), total, entropy, target.double())
    if rule is None:
        return stats
    find = _nucleus if rule.min_p is None else _nucleus_by_min_p
    parts = [find(x[tokens], stats, tokens, scale[tokens], shard, rule) for tokens in _blocks(x, shard.width)]
    empty = total.new_empty((0, 1))
    columns = zip(*parts, strict=True) if parts else [[empty]] * 4
    return stats._replace(nucleus=NucleusStats(*(torch.cat(list(part)) for part in columns)))


def gradient(logits: Tensor, column: Tensor, scale: Tensor, real: int, token: TokenGradient, out: Tensor) -> None:
    """Write the gradient of the real columns to ``out`` (which may be ``logits``), zero to the padding."""
    out[:, real:] = 0
    x, out = logits[:, :real], out[:, :real]
    for tokens in _blocks(x) if real else []:
        own, part = x[tokens], token.tokens(tokens)
        y, e = _weights(own, part.maximum, scale[tokens])
        d = y.mul_(math.log(2))
        result = part.a * e if part.b is None else (d * part.b).add_(part.a).mul_(e)
        if part.nucleus is not None:
            inside = in_nucleus(own.to(e.dtype), part.nucleus.theta, part.nucleus.keep_equal)
            result += torch.where(inside, d.mul_(part.nucleus.b).add_(part.nucleus.a).mul_(e), 0)
        target = column[tokens]
        result.scatter_add_(1, target.clamp_min(0), torch.where(target >= 0, part.at_target, 0))
        out[tokens] = result.to(out.dtype)


def _unit(shard: VocabShard) -> int:
    """How many bits lie below 1 in the integers: a whole vocabulary of ones still fits into 63."""
    return 62 - (shard.vocab_size - 1).bit_length()


def _counts(value: Tensor, unit: int) -> Tensor:
    """``value`` in [-1, 1] as whole numbers of 2^-unit. The product with a power of two is exact."""
    return (value * 2.0**unit).round_().long()


def _amount(count: Tensor, unit: int) -> Tensor:
    return count.double() * 2.0**-unit


def _blocks(x: Tensor, width: int | None = None) -> list[slice]:
    """Tokens worked on at once. With exchanges in between, ``width`` makes them the same on every rank."""
    step = max(1, BLOCK // max(1, width or x.shape[1]))
    return [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]


def _weights(x: Tensor, maximum: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """y = (x - maximum) * scale / log(2), no less than where 2^y is 0, and 2^y."""
    y = (x.to(scale.dtype) - maximum).mul_(scale * (1 / math.log(2))).clamp_min_(-_FLOATS[scale.dtype].bias)
    return y, power_of_two(y)


def _nucleus(
    x: Tensor, stats: GlobalStats, tokens: slice, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> NucleusStats:
    """The nucleus of a block of tokens: the search of nucleus.py, four bits of the cutoff token's key a round."""
    unit, group, V = _unit(shard), shard.group, x.shape[1]
    step, rounds = (1 << 16, 4) if x.dtype == torch.bfloat16 else (1, 16 if x.dtype == torch.float64 else 8)
    stats = GlobalStats.unpack(stats.pack(torch.float64)[tokens])
    x = ascending(x.to(scale.dtype, copy=True))
    y, e = _weights(x, torch.where(stats.maximum > -torch.inf, stats.maximum, 0).to(scale.dtype), scale)
    mass = torch.nn.functional.pad(_counts(e, unit).cumsum(1), (1, 0))  # of the logits before a column
    moment = torch.nn.functional.pad(_counts(e * y, unit).cumsum(1), (1, 0))

    def from_column(prefix: Tensor, column: Tensor) -> Tensor:
        return prefix[:, -1:] - prefix.gather(1, column)

    lowest = torch.where(x > -torch.inf, x, torch.inf).amin(1, keepdim=True) if V else torch.full_like(scale, torch.inf)
    low = torch.div(order_key(all_gather(lowest, group).amin(0)), step, rounding_mode="floor")
    high = torch.div(order_key(torch.full_like(lowest, torch.inf)), step, rounding_mode="floor")
    for _ in range(rounds if rule.top_p < 1 else 0):
        span = (high >> 4) - (low >> 4) + ((high & 15) - (low & 15) + 15 >> 4)  # (high - low) / 16 rounded up
        pivots = from_order_key(torch.cat([low + span * i for i in range(1, PIVOTS + 1)], 1) * step, x.dtype)
        above = all_gather(from_column(mass, torch.searchsorted(x, pivots)), group).sum(0)
        reached = (_amount(above, unit) >= rule.limit * stats.total).sum(-1, keepdim=True)
        low, high = low + span * reached, torch.where(reached < PIVOTS, low + span * (reached + 1), high)
    theta = from_order_key(low * step, x.dtype)
    start, end = torch.searchsorted(x, theta), torch.searchsorted(x, theta, right=True)
    own = torch.cat([from_column(mass, end), from_column(moment, end), V - end, end - start], 1)
    return apply_rule(stats, theta, _over_ranks(own, shard), scale.double(), rule)


def _nucleus_by_min_p(
    x: Tensor, stats: GlobalStats, tokens: slice, scale: Tensor, shard: VocabShard, rule: NucleusRule
) -> NucleusStats:
    """The nucleus of a block of tokens that ends at a probability: nothing is searched for."""
    assert rule.min_p is not None
    stats = GlobalStats.unpack(stats.pack(torch.float64)[tokens])
    x, theta = x.to(scale.dtype), cutoff(stats.maximum, scale, rule.min_p)
    y, e = _weights(x, torch.where(stats.maximum > -torch.inf, stats.maximum, 0).to(scale.dtype), scale)
    above, unit = x > theta, _unit(shard)
    sums = _counts(e, unit) * above, _counts(e * y, unit) * above, above, (x == theta) & (x > -torch.inf)
    own = torch.stack([value.sum(-1) for value in sums], 1)
    return apply_rule(stats, theta, _over_ranks(own, shard), scale.double(), rule)


def _over_ranks(own: Tensor, shard: VocabShard) -> AtTheta:
    """The ranks' counts ``[n, 4]`` int64 of mass and moment above theta, and of logits above and at it, as amounts."""
    unit, found = _unit(shard), all_gather(own, shard.group).sum(0).split(1, dim=1)
    mass, moment = _amount(found[0], unit), _amount(found[1], unit) * math.log(2)
    return AtTheta(mass, moment, found[2].double(), equal=found[3].double())

"""Which tokens of the vocabulary form the nucleus, decided on the device: by a token's owner from the candidates, or by
a search of its logits.

``decide_kernel`` merges what the ranks sent and walks down to the cutoff token; a token whose candidates do not
resolve it keeps size -1. For those ``search_kernel`` finds the cutoff token's key four bits a round: each rank adds up
the mass in 16 bins, the bins are gathered, and the next round starts by choosing one. ``search_sums_kernel`` takes the
sums above the key that was found. Programs of resolved tokens end at once, so that nobody has to ask how many are left.

Masses are fp64. The buffers are those of columns.py.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from megatron_ext.ops.kernels.columns import (
    ABOVE,
    AT_ABOVE,
    AT_COLUMNS,
    AT_EQUAL,
    AT_MASS,
    AT_MOMENT,
    BITS,
    COUNTS,
    ENTROPY,
    FLOOR,
    GLOBAL_COLUMNS,
    MASS,
    MAXIMUM,
    MOMENT,
    NUCLEUS_ENTROPY,
    SIZE,
    STATE_COLUMNS,
    TARGET,
    THETA,
    TOTAL,
)
from megatron_ext.ops.kernels.keys import LOG2E, clamped, from_order_key, from_short_key, order_key, short_key

BINS = 16  # of one round: four bits of the cutoff token's key
SEARCH_COLUMNS = 256  # a program's step over a token's columns: one a thread, with a sum for each bin
DECIDE_WARPS = 8
SEARCH_WARPS = 8


@triton.jit
def closed(mass, moment, size, total):
    """Entropy of a nucleus from its mass, sum of mass * d and size; 0 where it is empty, NaN where the total is."""
    some = (size > 0) & (total == total)
    safe = tl.where(some, mass, 1.0)
    return tl.where(some, tl.log(safe) - moment / safe, tl.where(total == total, 0.0, total))


@triton.jit
def decide_kernel(
    sums, counts, token_words, rank_words, first_token, T, scale, scale_stride, numbers,
    TOP_P: tl.constexpr, KEEP_EQUAL: tl.constexpr, KEYS: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """One program a token of this owner. ``sums`` (fp32) and ``counts`` (int16) view the words that the ranks sent."""
    token = tl.program_id(0).to(tl.int64)
    sums += token * token_words
    counts += token * token_words * 2 + COUNTS
    owned = first_token + token < T  # the last owner's tokens may be fewer
    scale = tl.load(scale + (first_token + token) * scale_stride, mask=owned, other=1.0).to(tl.float64)
    top = tl.full((), -float("inf"), tl.float32)
    floor = tl.full((), -float("inf"), tl.float32)
    target = tl.full((), -float("inf"), tl.float32)
    for rank in range(WORLD):
        top = tl.maximum(top, tl.load(sums + rank * rank_words + MAXIMUM))
        target = tl.maximum(target, tl.load(sums + rank * rank_words + TARGET))
        floor = tl.maximum(floor, tl.load(sums + rank * rank_words + FLOOR))
    key = tl.arange(0, KEYS)
    first = short_key(top)
    total = tl.full((), 0.0, tl.float64)
    moment = tl.full((), 0.0, tl.float64)
    count = tl.zeros((KEYS,), tl.int32)
    for rank in range(WORLD):
        own = tl.load(sums + rank * rank_words + MAXIMUM)
        shift = clamped((own - top).to(tl.float64) * scale)
        weight = tl.exp(shift)
        own_total = tl.load(sums + rank * rank_words + TOTAL).to(tl.float64)
        total += own_total * weight
        moment += (tl.load(sums + rank * rank_words + MOMENT).to(tl.float64) + own_total * shift) * weight
        below = key - (first - short_key(own))
        count += tl.load(counts + rank * rank_words * 2 + below, mask=(below >= 0) & (below < KEYS), other=0).to(
            tl.int32
        )
    logit = from_short_key(first - key)
    d = clamped((logit - top).to(tl.float64) * scale)
    mass = count.to(tl.float64) * tl.exp(d)
    cutoff = tl.full((), KEYS, tl.int32)
    if TOP_P < 1:
        cutoff = tl.sum((tl.cumsum(mass, 0) < TOP_P * total).to(tl.int32), 0)
    at = key == tl.minimum(cutoff, KEYS - 1)
    above = key < cutoff
    theta = tl.max(tl.where(at, logit, -float("inf")), 0)
    equal = tl.sum(tl.where(at, count, 0), 0) if KEEP_EQUAL else 0
    one = tl.sum(tl.where(at & KEEP_EQUAL, mass, 0.0), 0)
    nucleus_mass = tl.sum(tl.where(above, mass, 0.0), 0) + one
    nucleus_moment = tl.sum(tl.where(above | (at & KEEP_EQUAL), mass * d, 0.0), 0)
    size = (tl.sum(tl.where(above, count, 0), 0) + equal).to(tl.float64)
    entropy = closed(nucleus_mass, nucleus_moment, size, total)
    resolved = ((cutoff < KEYS) & (theta > floor)) | (total != total)
    numbers += token * GLOBAL_COLUMNS
    tl.store(numbers + MAXIMUM, top)
    tl.store(numbers + TOTAL, total.to(tl.float32))
    tl.store(numbers + ENTROPY, (tl.log(total) - moment / total).to(tl.float32))
    tl.store(numbers + TARGET, target)
    tl.store(numbers + THETA, theta)
    tl.store(numbers + MASS, nucleus_mass.to(tl.float32))
    tl.store(numbers + NUCLEUS_ENTROPY, entropy.to(tl.float32))
    tl.store(numbers + SIZE, tl.where(resolved, size, -1.0).to(tl.float32))


@triton.jit
def chosen_bin(state, gathered, token, T, total, TOP_P: tl.constexpr, ROUND: tl.constexpr, WORLD: tl.constexpr):
    """The key's bits so far and the mass above them, after a round whose bins ``[WORLD, T, 16]`` were gathered.

    ``TOP_P`` 1 ends at the lowest finite logit; otherwise rounding may leave the mass short of TOP_P: at the lowest
    bin with any.
    """
    bits = tl.full((), 0, tl.int64)
    above = tl.full((), 0.0, tl.float64)
    if ROUND > 1:
        bits = tl.load(state + token * STATE_COLUMNS + BITS).to(tl.int64)
        above = tl.load(state + token * STATE_COLUMNS + ABOVE)
    bin = tl.arange(0, 16)
    mass = tl.zeros((16,), tl.float64)
    for rank in range(WORLD):
        mass += tl.load(gathered + (rank * T + token) * 16 + bin)
    lowest = tl.min(tl.where(mass > 0, bin, 15), 0)
    chosen = lowest
    if TOP_P < 1:
        reached = above + tl.cumsum(mass, 0, reverse=True) >= TOP_P * total
        chosen = tl.maximum(lowest, tl.max(tl.where(reached, bin, -1), 0))
    above += tl.sum(tl.where(bin > chosen, mass, 0.0), 0)
    return bits * 16 + chosen, above


@triton.jit
def search_kernel(
    logits, token_stride, scale, scale_stride, numbers, state, gathered, bins, V, T,
    TOP_P: tl.constexpr, ROUND: tl.constexpr, WORLD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a token: the mass of this shard in each of the 16 bins that four more bits of the key make.

    ``bins`` ``[T, 16]`` fp64; ``gathered`` those of the round before from all ranks; ``state`` ``[T, 2]`` fp64. With
    TOP_P 1 logits are counted instead of weighed: the least likely must be seen too.
    """
    token = tl.program_id(0).to(tl.int64)
    size = tl.load(numbers + token * GLOBAL_COLUMNS + SIZE)
    if size < 0:
        logits += token * token_stride
        scale2 = tl.load(scale + token * scale_stride) * LOG2E
        top = tl.load(numbers + token * GLOBAL_COLUMNS + MAXIMUM)
        total = tl.load(numbers + token * GLOBAL_COLUMNS + TOTAL).to(tl.float64)
        bits = tl.full((), 0, tl.int64)
        if ROUND > 0:
            bits, above = chosen_bin(state, gathered, token, T, total, TOP_P, ROUND, WORLD)  # pyright: ignore[reportGeneralTypeIssues]
            tl.store(state + token * STATE_COLUMNS + BITS, bits.to(tl.float64))
            tl.store(state + token * STATE_COLUMNS + ABOVE, above)
        column = tl.arange(0, COLUMNS)
        bin = tl.arange(0, 16)
        mass = tl.zeros((16, COLUMNS), tl.float64)
        for start in range(0, V, COLUMNS):
            offset = start + column
            x = tl.load(logits + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
            e = tl.where(x > -float("inf"), 1.0, 0.0)
            if TOP_P < 1:
                e = tl.exp2(clamped((x - top) * scale2))
            key = (order_key(x).to(tl.int64) + 2147483648) >> (28 - 4 * ROUND)
            e = tl.where((key >> 4) == bits, e, 0.0) if ROUND > 0 else e
            at = (key & 15).to(tl.int32)
            mass += tl.where(at[None, :] == bin[:, None], e[None, :], 0.0).to(tl.float64)
        tl.store(bins + token * 16 + bin, tl.sum(mass, 1))


@triton.jit
def search_sums_kernel(
    logits, token_stride, scale, scale_stride, numbers, state, gathered, sums, V, T,
    TOP_P: tl.constexpr, ROUNDS: tl.constexpr, WORLD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a token: theta into ``numbers``; mass and sum of mass * d above it, counts above and at it."""
    token = tl.program_id(0).to(tl.int64)
    size = tl.load(numbers + token * GLOBAL_COLUMNS + SIZE)
    if size < 0:
        logits += token * token_stride
        factor = tl.load(scale + token * scale_stride)
        top = tl.load(numbers + token * GLOBAL_COLUMNS + MAXIMUM)
        total = tl.load(numbers + token * GLOBAL_COLUMNS + TOTAL).to(tl.float64)
        bits, _ = chosen_bin(state, gathered, token, T, total, TOP_P, ROUNDS, WORLD)  # pyright: ignore[reportGeneralTypeIssues]
        theta = from_order_key(((bits << (32 - 4 * ROUNDS)) - 2147483648).to(tl.int32))
        tl.store(numbers + token * GLOBAL_COLUMNS + THETA, theta)
        column = tl.arange(0, COLUMNS)
        mass = tl.zeros((COLUMNS,), tl.float64)
        moment = tl.zeros((COLUMNS,), tl.float64)
        above = tl.zeros((COLUMNS,), tl.int32)
        equal = tl.zeros((COLUMNS,), tl.int32)
        for start in range(0, V, COLUMNS):
            offset = start + column
            x = tl.load(logits + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
            d = clamped((x - top) * factor)
            e = tl.where(x > theta, tl.exp2(d * LOG2E), 0.0)
            mass += e.to(tl.float64)
            moment += (e * d).to(tl.float64)
            above += (x > theta).to(tl.int32)
            equal += ((x == theta) & (x > -float("inf"))).to(tl.int32)
        sums += token * AT_COLUMNS
        tl.store(sums + AT_MASS, tl.sum(mass, 0))
        tl.store(sums + AT_MOMENT, tl.sum(moment, 0))
        tl.store(sums + AT_ABOVE, tl.sum(above, 0).to(tl.float64))
        tl.store(sums + AT_EQUAL, tl.sum(equal, 0).to(tl.float64))

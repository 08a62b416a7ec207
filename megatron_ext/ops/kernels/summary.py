"""The forward's pass over a shard's logits, and the candidates: the highest of them (bf16).

The first kernel reads every logit once. It leaves the token's sums and, for the second, the short key of the maximum of
every group of 32 columns. The second kernel looks only into groups that can hold a candidate and counts the logits at
each of ``KEYS`` representable values from the token's maximum down, in shared memory.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
# (triton is an optional package, and a kernel is launched by subscripting it)
import triton
import triton.language as tl

from megatron_ext.ops.kernels.columns import COUNTS, FLOOR, MAXIMUM, MOMENT, TARGET, TOTAL
from megatron_ext.ops.kernels.keys import LN2, LOG2E, NOTHING, clamped, from_short_key, short_key

GROUP = 32  # columns that share a maximum
COLUMNS = 4096  # a program's step over a token's columns
WARPS = 8
CANDIDATES_WARPS = 8
DEPTHS: tl.constexpr = tl.constexpr(8)  # how far down the candidates may go, in eighths


@triton.jit
def summary_kernel(
    logits, token_stride, targets, first_column, scale, scale_stride, sums, sums_stride, maxima, V,
    WITH_MOMENT: tl.constexpr, WITH_MAXIMA: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a token: (m, S, sum d e^d, x[target]), d = (x - m) * scale, and the groups' maxima, if WITH_MAXIMA.

    Sums are kept apart for each of COLUMNS / GROUP lanes, each with a maximum of its own, and joined at the end: no
    reduction over the whole program happens on the way.
    """
    LANES: tl.constexpr = COLUMNS // GROUP
    token = tl.program_id(0).to(tl.int64)
    logits += token * token_stride
    scale2 = tl.load(scale + token * scale_stride) * LOG2E
    lane = tl.arange(0, LANES)
    within = tl.arange(0, GROUP)
    num_groups = tl.cdiv(V, GROUP)
    m = tl.full((LANES,), -float("inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, COLUMNS):
        offset = start + lane[:, None] * GROUP + within[None, :]
        x = tl.load(logits + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
        highest = tl.max(x, 1)
        if WITH_MAXIMA:
            group = start // GROUP + lane
            tl.store(maxima + token * num_groups + group, short_key(highest).to(tl.int16), mask=group < num_groups)
        new = tl.maximum(m, highest)
        base = tl.where(new == -float("inf"), 0.0, new)
        shift = tl.where(m == -float("inf"), 0.0, (m - base) * scale2)
        keep = tl.exp2(shift)
        d = clamped((x - base[:, None]) * scale2)
        e = tl.exp2(d)
        if WITH_MOMENT:
            moment = (moment + total * shift) * keep + tl.sum(e * d, 1)
        total = total * keep + tl.sum(e, 1)
        m = new
    top = tl.max(m, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    shift = tl.where(m == -float("inf"), 0.0, (m - base) * scale2)
    keep = tl.exp2(shift)
    column = tl.load(targets + token) - first_column
    inside = (column >= 0) & (column < V)
    at_target = tl.load(logits + tl.where(inside, column, 0), mask=inside, other=-float("inf")).to(tl.float32)
    sums += token * sums_stride
    tl.store(sums + MAXIMUM, top)
    tl.store(sums + TOTAL, tl.sum(total * keep, 0))
    tl.store(sums + MOMENT, tl.sum((moment + total * shift) * keep, 0) * LN2 if WITH_MOMENT else 0.0)
    tl.store(sums + TARGET, at_target)


@triton.jit
def candidates_kernel(
    logits, token_stride, scale, scale_stride, sums, counts, token_words, maxima, V, held_share,
    KEYS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a token: counts of logits at each of the KEYS highest keys, and the floor: none above it is missing.

    ``sums`` (fp32) and ``counts`` (int16) view the token's words (columns.py). The candidates go down to the first of
    eight depths at which the groups' maxima alone hold ``held_share`` of the shard's mass, or as far as costs no more
    than two tiles of groups. The maxima are written over with the numbers of the chosen groups.
    """
    token = tl.program_id(0).to(tl.int64)
    logits += token * token_stride
    sums += token * token_words
    counts += token * token_words * 2 + COUNTS
    num_groups = tl.cdiv(V, GROUP)
    maxima += token * num_groups
    scale2 = tl.load(scale + token * scale_stride) * LOG2E
    m = tl.load(sums + MAXIMUM)
    total = tl.load(sums + TOTAL)
    first = short_key(m)
    depth = tl.arange(0, DEPTHS)
    bounds = first - (depth + 1) * (KEYS // DEPTHS)
    held = tl.zeros((DEPTHS,), tl.float32)
    number = tl.zeros((DEPTHS,), tl.int32)
    step = tl.arange(0, STEP)
    for start in range(0, num_groups, STEP):
        key = tl.load(maxima + start + step, mask=start + step < num_groups, other=NOTHING).to(tl.int32)
        mass = tl.exp2(clamped((from_short_key(key) - m) * scale2))
        above = key[None, :] > bounds[:, None]
        held += tl.sum(tl.where(above, mass[None, :], 0.0), 1)
        number += tl.sum(above.to(tl.int32), 1)
    enough = tl.min(tl.where(held >= held_share * total, depth, DEPTHS - 1), 0)
    cheap = tl.max(tl.where(number <= 2 * TILE, depth, 0), 0)
    bound = first - (tl.maximum(enough, cheap) + 1) * (KEYS // DEPTHS)
    missing = tl.full((), NOTHING, tl.int32)
    chosen_groups = tl.full((), 0, tl.int32)
    for start in range(0, num_groups, STEP):
        key = tl.load(maxima + start + step, mask=start + step < num_groups, other=NOTHING).to(tl.int32)
        tl.debug_barrier()  # all of the step is read before any of it is written over
        chosen = key > tl.maximum(bound, NOTHING)
        slot = chosen_groups + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(maxima + slot, (start + step).to(tl.int16), mask=chosen)
        missing = tl.maximum(missing, tl.max(tl.where(chosen, NOTHING, key), 0))
        chosen_groups += tl.sum(chosen.to(tl.int32), 0)
    tl.debug_barrier()
    count = tl.zeros((KEYS,), tl.int32)
    tile = tl.arange(0, TILE)
    within = tl.arange(0, GROUP)
    for start in range(0, chosen_groups, TILE):
        real = start + tile < chosen_groups
        group = tl.load(maxima + start + tile, mask=real, other=0).to(tl.int32)
        offset = group[:, None] * GROUP + within[None, :]
        valid = real[:, None] & (offset < V)
        x = tl.load(logits + offset, mask=valid, other=-float("inf")).to(tl.float32)
        key = short_key(x)
        finite = x > -float("inf")
        counted = finite & (key > bound) & (key <= first)
        missing = tl.maximum(missing, tl.max(tl.max(tl.where(finite & (key <= bound), key, NOTHING), 1), 0))
        below = tl.reshape(tl.where(counted, first - key, 0), (TILE * GROUP,))
        count += tl.histogram(below, KEYS, mask=tl.reshape(counted, (TILE * GROUP,)))
    overflow = tl.max(count, 0) > 32767
    tl.store(sums + FLOOR, tl.where(overflow, float("inf"), from_short_key(missing)))
    tl.store(counts + tl.arange(0, KEYS), tl.minimum(count, 32767).to(tl.int16))

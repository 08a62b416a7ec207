"""The nucleus by min_p on the device: what ops/min_p.py does, one program a token.

The summary leaves the short key of the maximum of every group of 32 columns. Once the shards' sums are gathered theta
is known, and only the groups whose maximum reaches it are read a second time.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from megatron_ext.ops.kernels.columns import (
    AT_ABOVE,
    AT_COLUMNS,
    AT_EQUAL,
    AT_MASS,
    AT_MOMENT,
    ENTROPY,
    GLOBAL_COLUMNS,
    MASS,
    MAXIMUM,
    MOMENT,
    NUCLEUS_ENTROPY,
    SHARD_COLUMNS,
    SIZE,
    TARGET,
    THETA,
    TOTAL,
)
from megatron_ext.ops.kernels.keys import LOG2E, NOTHING, clamped, short_key

GROUPS = 64  # maxima that a program looks at once
WARPS = 4


@triton.jit
def min_p_kernel(
    logits, token_stride, scale, scale_stride, gathered, maxima, numbers, sums, V, T,
    LOG_MIN_P: tl.constexpr, WORLD: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``gathered`` ``[WORLD, T, 4]``, the shards' sums, to ``numbers`` ``[T, 8]`` but for what the nucleus holds (size
    -1: it is still to come), and this shard's ``sums`` ``[T, 4]`` fp64 above theta."""
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + token * scale_stride)
    top = tl.full((), -float("inf"), tl.float32)
    target = tl.full((), -float("inf"), tl.float32)
    for rank in range(WORLD):
        at = gathered + (rank * T + token) * SHARD_COLUMNS
        top = tl.maximum(top, tl.load(at + MAXIMUM))
        target = tl.maximum(target, tl.load(at + TARGET))
    total = tl.full((), 0.0, tl.float64)
    moment = tl.full((), 0.0, tl.float64)
    for rank in range(WORLD):
        at = gathered + (rank * T + token) * SHARD_COLUMNS
        shift = clamped((tl.load(at + MAXIMUM) - top).to(tl.float64) * factor.to(tl.float64))
        weight = tl.exp(shift)
        own = tl.load(at + TOTAL).to(tl.float64)
        total += own * weight
        moment += (tl.load(at + MOMENT).to(tl.float64) + own * shift) * weight
    theta = (top.to(tl.float64) + LOG_MIN_P / factor.to(tl.float64)).to(tl.float32)
    numbers += token * GLOBAL_COLUMNS
    tl.store(numbers + MAXIMUM, top)
    tl.store(numbers + TOTAL, total.to(tl.float32))
    tl.store(numbers + ENTROPY, (tl.log(total) - moment / total).to(tl.float32))
    tl.store(numbers + TARGET, target)
    tl.store(numbers + THETA, theta)
    tl.store(numbers + MASS, 0.0)
    tl.store(numbers + NUCLEUS_ENTROPY, 0.0)
    tl.store(numbers + SIZE, -1.0)
    logits += token * token_stride
    num_groups = tl.cdiv(V, GROUP)
    maxima += token * num_groups
    bound = short_key(theta)  # a logit from theta on has no lower one, whatever its dtype
    step = tl.arange(0, GROUPS)
    within = tl.arange(0, GROUP)
    mass = tl.zeros((GROUPS,), tl.float64)
    slope = tl.zeros((GROUPS,), tl.float64)
    above = tl.zeros((GROUPS,), tl.int32)
    equal = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, num_groups, GROUPS):
        group = start + step
        key = tl.load(maxima + group, mask=group < num_groups, other=NOTHING).to(tl.int32)
        reaches = key >= bound
        if tl.max(reaches.to(tl.int32), 0) > 0:
            offset = group[:, None] * GROUP + within[None, :]
            read = reaches[:, None] & (offset < V)
            x = tl.load(logits + offset, mask=read, other=-float("inf")).to(tl.float32)
            d = clamped((x - top) * factor)
            e = tl.where(x > theta, tl.exp2(d * LOG2E), 0.0)
            mass += tl.sum(e, 1).to(tl.float64)
            slope += tl.sum(tl.where(x > theta, e * d, 0.0), 1).to(tl.float64)
            above += tl.sum((x > theta).to(tl.int32), 1)
            equal += tl.sum(((x == theta) & (x > -float("inf"))).to(tl.int32), 1)
    sums += token * AT_COLUMNS
    tl.store(sums + AT_MASS, tl.sum(mass, 0))
    tl.store(sums + AT_MOMENT, tl.sum(slope, 0))
    tl.store(sums + AT_ABOVE, tl.sum(above, 0).to(tl.float64))
    tl.store(sums + AT_EQUAL, tl.sum(equal, 0).to(tl.float64))

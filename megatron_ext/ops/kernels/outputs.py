"""From a token's numbers to the operator's outputs, one program for 128 tokens. The buffers are those of columns.py."""

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
from megatron_ext.ops.kernels.keys import clamped
from megatron_ext.ops.kernels.nucleus import closed

TOKENS = 128
WARPS = 4


@triton.jit
def outputs_kernel(
    gathered, scale, scale_stride, numbers, logprob, entropy, T, WORLD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Without a nucleus: merge the shards' sums ``[WORLD, T, 4]`` into numbers ``[T, 4]``, log-prob and entropy."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = token < T
    scale = tl.load(scale + token * scale_stride, mask=real, other=1.0).to(tl.float64)
    top = tl.full((TOKENS,), -float("inf"), tl.float32)
    target = tl.full((TOKENS,), -float("inf"), tl.float32)
    for rank in range(WORLD):
        at = gathered + (rank * T + token) * SHARD_COLUMNS
        top = tl.maximum(top, tl.load(at + MAXIMUM, mask=real, other=0.0))
        target = tl.maximum(target, tl.load(at + TARGET, mask=real, other=0.0))
    total = tl.zeros((TOKENS,), tl.float64)
    moment = tl.zeros((TOKENS,), tl.float64)
    for rank in range(WORLD):
        at = gathered + (rank * T + token) * SHARD_COLUMNS
        shift = clamped((tl.load(at + MAXIMUM, mask=real, other=0.0) - top).to(tl.float64) * scale)
        weight = tl.exp(shift)
        own = tl.load(at + TOTAL, mask=real, other=1.0).to(tl.float64)
        total += own * weight
        moment += (tl.load(at + MOMENT, mask=real, other=0.0).to(tl.float64) + own * shift) * weight
    value = tl.log(total) - moment / total
    tl.store(numbers + token * SHARD_COLUMNS + MAXIMUM, top, mask=real)
    tl.store(numbers + token * SHARD_COLUMNS + TOTAL, total.to(tl.float32), mask=real)
    tl.store(numbers + token * SHARD_COLUMNS + ENTROPY, value.to(tl.float32), mask=real)
    tl.store(numbers + token * SHARD_COLUMNS + TARGET, target, mask=real)
    at_target = (target - top).to(tl.float64) * scale
    tl.store(logprob + token, (at_target - tl.log(total)).to(tl.float32), mask=real)
    tl.store(entropy + token, value.to(tl.float32), mask=real)


@triton.jit
def nucleus_outputs_kernel(
    gathered, scale, scale_stride, numbers, fallback,
    logprob, entropy, nucleus_entropy, nucleus_mass, nucleus_size, nucleus_logprob, T,
    KEEP_EQUAL: tl.constexpr, WORLD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """With a nucleus: complete the tokens that were searched, whose sums ``[WORLD, T, 4]`` fp64 were gathered."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = token < T
    scale = tl.load(scale + token * scale_stride, mask=real, other=1.0).to(tl.float64)
    numbers += token * GLOBAL_COLUMNS
    top = tl.load(numbers + MAXIMUM, mask=real, other=0.0)
    total = tl.load(numbers + TOTAL, mask=real, other=1.0)
    target = tl.load(numbers + TARGET, mask=real, other=0.0)
    theta = tl.load(numbers + THETA, mask=real, other=0.0)
    mass = tl.load(numbers + MASS, mask=real, other=1.0)
    inside_entropy = tl.load(numbers + NUCLEUS_ENTROPY, mask=real, other=0.0)
    size = tl.load(numbers + SIZE, mask=real, other=0.0)
    searched = real & (size < 0)
    sums = tl.zeros((TOKENS,), tl.float64)
    moment = tl.zeros((TOKENS,), tl.float64)
    above = tl.zeros((TOKENS,), tl.float64)
    equal = tl.zeros((TOKENS,), tl.float64)
    for rank in range(WORLD):
        at = gathered + (rank * T + token) * AT_COLUMNS
        sums += tl.load(at + AT_MASS, mask=searched, other=0.0)
        moment += tl.load(at + AT_MOMENT, mask=searched, other=0.0)
        above += tl.load(at + AT_ABOVE, mask=searched, other=0.0)
        equal += tl.load(at + AT_EQUAL, mask=searched, other=0.0)
    if KEEP_EQUAL:
        d = clamped((theta - top).to(tl.float64) * scale)
        one = equal * tl.exp(d)
        sums += one
        moment += one * d
        above += equal
    mass = tl.where(searched, sums.to(tl.float32), mass)
    found = closed(sums, moment, above, total.to(tl.float64)).to(tl.float32)
    inside_entropy = tl.where(searched, found, inside_entropy)
    size = tl.where(searched, above.to(tl.float32), size)
    tl.store(numbers + MASS, mass, mask=real)
    tl.store(numbers + NUCLEUS_ENTROPY, inside_entropy, mask=real)
    tl.store(numbers + SIZE, size, mask=real)
    tl.atomic_add(fallback, tl.sum(searched.to(tl.int64), 0))
    at_target = (target - top).to(tl.float64) * scale
    log_total = tl.log(total.to(tl.float64))
    hit = (target >= theta) & (target > -float("inf")) if KEEP_EQUAL else target > theta
    tl.store(logprob + token, (at_target - log_total).to(tl.float32), mask=real)
    tl.store(entropy + token, tl.load(numbers + ENTROPY, mask=real, other=0.0), mask=real)
    tl.store(nucleus_entropy + token, inside_entropy, mask=real)
    tl.store(nucleus_mass + token, (mass.to(tl.float64) / total.to(tl.float64)).to(tl.float32), mask=real)
    tl.store(nucleus_size + token, size, mask=real)
    outside = -float("inf")
    inside = tl.where(hit, at_target - tl.log(mass.to(tl.float64)), outside)
    inside = tl.where(total == total, inside, log_total)  # NaN beside a NaN logit
    tl.store(nucleus_logprob + token, inside.to(tl.float32), mask=real)

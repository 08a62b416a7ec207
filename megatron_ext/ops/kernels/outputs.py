"""From the row's numbers to the operator's outputs, one program for 128 rows. ``numbers`` as in nucleus.py."""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from megatron_ext.ops.kernels.keys import clamped
from megatron_ext.ops.kernels.nucleus import closed

ROWS = 128
WARPS = 4


@triton.jit
def outputs_kernel(
    gathered, scale, scale_stride, numbers, logprob, entropy, T, WORLD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Without a nucleus: merge the shards' sums ``[WORLD, T, 4]`` into numbers ``[T, 4]``, log-prob and entropy."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < T
    scale = tl.load(scale + row * scale_stride, mask=real, other=1.0).to(tl.float64)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    target = tl.full((ROWS,), -float("inf"), tl.float32)
    for rank in range(WORLD):
        at = gathered + (rank * T + row) * 4
        top = tl.maximum(top, tl.load(at, mask=real, other=0.0))
        target = tl.maximum(target, tl.load(at + 3, mask=real, other=0.0))
    total = tl.zeros((ROWS,), tl.float64)
    moment = tl.zeros((ROWS,), tl.float64)
    for rank in range(WORLD):
        at = gathered + (rank * T + row) * 4
        shift = clamped((tl.load(at, mask=real, other=0.0) - top).to(tl.float64) * scale)
        weight = tl.exp(shift)
        own = tl.load(at + 1, mask=real, other=1.0).to(tl.float64)
        total += own * weight
        moment += (tl.load(at + 2, mask=real, other=0.0).to(tl.float64) + own * shift) * weight
    value = tl.log(total) - moment / total
    tl.store(numbers + row * 4, top, mask=real)
    tl.store(numbers + row * 4 + 1, total.to(tl.float32), mask=real)
    tl.store(numbers + row * 4 + 2, value.to(tl.float32), mask=real)
    tl.store(numbers + row * 4 + 3, target, mask=real)
    at_target = (target - top).to(tl.float64) * scale
    tl.store(logprob + row, (at_target - tl.log(total)).to(tl.float32), mask=real)
    tl.store(entropy + row, value.to(tl.float32), mask=real)


@triton.jit
def nucleus_outputs_kernel(
    gathered, scale, scale_stride, numbers, fallback,
    logprob, entropy, nucleus_entropy, nucleus_mass, nucleus_size, nucleus_logprob, target_in_nucleus, T,
    KEEP_EQUAL: tl.constexpr, WORLD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """With a nucleus: complete the rows that were searched, whose sums ``[WORLD, T, 4]`` fp64 were gathered."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < T
    scale = tl.load(scale + row * scale_stride, mask=real, other=1.0).to(tl.float64)
    numbers += row * 8
    top = tl.load(numbers, mask=real, other=0.0)
    total = tl.load(numbers + 1, mask=real, other=1.0)
    target = tl.load(numbers + 3, mask=real, other=0.0)
    theta = tl.load(numbers + 4, mask=real, other=0.0)
    mass = tl.load(numbers + 5, mask=real, other=1.0)
    inside_entropy = tl.load(numbers + 6, mask=real, other=0.0)
    size = tl.load(numbers + 7, mask=real, other=0.0)
    searched = real & (size < 0)
    sums = tl.zeros((ROWS,), tl.float64)
    moment = tl.zeros((ROWS,), tl.float64)
    above = tl.zeros((ROWS,), tl.float64)
    equal = tl.zeros((ROWS,), tl.float64)
    for rank in range(WORLD):
        at = gathered + (rank * T + row) * 4
        sums += tl.load(at, mask=searched, other=0.0)
        moment += tl.load(at + 1, mask=searched, other=0.0)
        above += tl.load(at + 2, mask=searched, other=0.0)
        equal += tl.load(at + 3, mask=searched, other=0.0)
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
    tl.store(numbers + 5, mass, mask=real)
    tl.store(numbers + 6, inside_entropy, mask=real)
    tl.store(numbers + 7, size, mask=real)
    tl.atomic_add(fallback, tl.sum(searched.to(tl.int64), 0))
    at_target = (target - top).to(tl.float64) * scale
    log_total = tl.log(total.to(tl.float64))
    hit = (target >= theta) & (target > -float("inf")) if KEEP_EQUAL else target > theta
    tl.store(logprob + row, (at_target - log_total).to(tl.float32), mask=real)
    tl.store(entropy + row, tl.load(numbers + 2, mask=real, other=0.0), mask=real)
    tl.store(nucleus_entropy + row, inside_entropy, mask=real)
    tl.store(nucleus_mass + row, (mass.to(tl.float64) / total.to(tl.float64)).to(tl.float32), mask=real)
    tl.store(nucleus_size + row, size, mask=real)
    outside = -float("inf")
    inside = tl.where(hit, at_target - tl.log(mass.to(tl.float64)), outside)
    tl.store(nucleus_logprob + row, inside.to(tl.float32), mask=real)
    tl.store(target_in_nucleus + row, hit.to(tl.int8), mask=real)

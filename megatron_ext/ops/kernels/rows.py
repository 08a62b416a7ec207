"""The row work of rows.py as two Triton kernels: same functions, same arguments, same results to fp32 rounding.

Bytes per element of bf16 logits: the forward reads 2 from memory (its second walk over a row finds it in L2), the
backward reads 2 and writes 2. Offsets of rows are int64: T * V passes 2^31 at T = 16k, V = 152k.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
# (triton is an optional package, and a kernel is launched by subscripting it)
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.ops.rows import RowGradient
from megatron_ext.ops.window import Mass, Window, block_maxima, counted_window, make_window

BLOCK = 4096  # columns a program handles at once
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _order_key(x):
    """bf16 values held in fp32 to consecutive integers in their order, 0.0 and -0.0 alike."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits) >> 16


@triton.jit
def _summary_kernel(
    logits, row_stride, column, scale, sums, count, floor, V, least,
    KEYS: tl.constexpr, MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: (m, S, sum d e^d, x[target]) online, then the tokens at each key below m, if KEYS."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    scale2 = tl.load(scale + row) * LOG2E
    m = -float("inf")
    total = 0.0
    moment = 0.0
    for start in range(0, V, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        x = tl.load(logits + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(m, tl.max(x, 0), propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new == -float("inf"), 0.0, new)
        shift = tl.where(m == -float("inf"), 0.0, (m - base) * scale2)
        d = tl.maximum((x - base) * scale2, -1e30, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(d)
        keep = tl.exp2(shift)
        if MOMENT:
            moment = (moment + total * shift) * keep + tl.sum(e * d, 0)
        total = total * keep + tl.sum(e, 0)
        m = new
    y = tl.load(column + row)
    at_target = tl.load(logits + tl.maximum(y, 0)).to(tl.float32)
    tl.store(sums + row * 4, m)
    tl.store(sums + row * 4 + 1, total)
    tl.store(sums + row * 4 + 2, moment * LN2)
    tl.store(sums + row * 4 + 3, tl.where(y >= 0, at_target, -float("inf")))
    if KEYS > 0:
        lowest = tl.where(m == -float("inf"), m, m + tl.log2(total * least) / scale2)
        tl.store(floor + row, lowest)
        first = _order_key(m)
        for start in range(0, V, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            x = tl.load(logits + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
            step = first - _order_key(x)
            counted = (x > lowest) & (step >= 0) & (step < KEYS)
            tl.atomic_add(count + row * KEYS + step, 1, mask=counted, sem="relaxed")


@triton.jit
def _gradient_kernel(
    logits, row_stride, column, out, out_stride, numbers, cut, V, width,
    B: tl.constexpr, NUCLEUS: tl.constexpr, KEEP_EQUAL: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of a row. ``numbers`` [T, 8]: maximum, scale, a, b, at_target, a_n, b_n, theta."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers += row * 8
    maximum = tl.load(numbers)
    scale = tl.load(numbers + 1)
    x = tl.load(logits + row * row_stride + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
    d = tl.maximum((x - maximum) * scale, -1e30, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.load(numbers + 2)
    if B:
        factor = factor + tl.load(numbers + 3) * d
    if NUCLEUS:
        theta = tl.load(numbers + 7)
        if CUT:
            inside = (x > theta) | ((x == theta) & (offset <= tl.load(cut + row)))
        elif KEEP_EQUAL:
            inside = (x >= theta) & (x > -float("inf"))
        else:
            inside = x > theta
        factor = factor + tl.where(inside, tl.load(numbers + 5) + tl.load(numbers + 6) * d, 0.0)
    gradient = tl.exp2(d * LOG2E) * factor
    gradient += tl.where(offset == tl.load(column + row), tl.load(numbers + 4), 0.0)
    gradient = tl.where(offset < V, gradient, 0.0)
    tl.store(out + row * out_stride + offset, gradient.to(out.dtype.element_ty), mask=offset < width)


def summarise(
    logits: Tensor, column: Tensor, scale: Tensor, real: int, *, moment: bool, window: int | None, tail: float
) -> tuple[Tensor, Window | None]:
    """See rows.summarise. fp32 logits are listed by torch's own selection; bf16 logits are counted here."""
    T, device = len(logits), logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    keys = 2 * window if window and logits.dtype == torch.bfloat16 else 0
    if not T or not real:
        sums = torch.zeros((T, 4), device=device)
        sums[:, 0] = sums[:, 3] = -torch.inf
        return sums, Window.empty(T, window, logits.dtype, torch.float32, device) if window else None
    sums = torch.empty((T, 4), device=device)
    count = torch.zeros((T, max(keys, 1)), dtype=torch.int32, device=device)
    floor = torch.empty((T, 1), device=device)
    _summary_kernel[(T,)](
        logits, logits.stride(0), column.contiguous(), scale.contiguous(), sums, count, floor, real, tail / real,
        KEYS=keys, MOMENT=moment, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    if not window:
        return sums, None
    if keys:
        return sums, counted_window(count, floor, sums[:, :1])
    x = logits[:, :real]
    return sums, make_window(x, block_maxima(x), sums[:, :1], window, Mass(sums[:, 1:2], scale, tail))


def gradient(logits: Tensor, column: Tensor, scale: Tensor, real: int, row: RowGradient, out: Tensor) -> None:
    """See rows.gradient."""
    if not len(out):
        return
    assert out.stride(1) == 1
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    zero = torch.zeros_like(row.maximum)
    a_n, b_n = row.nucleus or (zero, zero)
    theta = zero if row.theta is None else row.theta
    columns = [row.maximum, scale, row.a, zero if row.b is None else row.b, row.at_target, a_n, b_n, theta]
    numbers = torch.cat(columns, 1)
    _gradient_kernel[(len(out), triton.cdiv(out.shape[1], BLOCK))](
        logits, logits.stride(0), column.contiguous(), out, out.stride(0), numbers,
        column if row.cut is None else row.cut.contiguous(), real, out.shape[1],
        B=row.b is not None, NUCLEUS=row.nucleus is not None, KEEP_EQUAL=row.keep_equal, CUT=row.cut is not None,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip

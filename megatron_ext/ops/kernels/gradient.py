"""The backward: one pass that reads the logits and writes their gradient, over them if asked to.

With d = (x - m) / T the gradient of a row's logits is

    dx_j = e^d_j (a + b d_j) + 1[j in nucleus] e^d_j (a_n + b_n d_j) + 1[j = target] at_target

and every program makes the six numbers of its row from the saved ones (nucleus.py) and the upstream gradients.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from megatron_ext.ops.kernels.keys import LOG2E, clamped

COLUMNS = 4096
WARPS = 8


@triton.jit
def gradient_kernel(
    logits, token_stride, targets, first_column, scale, scale_stride, numbers, out, out_stride, V, width,
    g_logprob, s_logprob, g_entropy, s_entropy, g_inside, s_inside, g_target, s_target,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, INSIDE: tl.constexpr, TARGET: tl.constexpr,
    KEEP_EQUAL: tl.constexpr, NUMBERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a block of a row. ``g_*`` with stride ``s_*``: upstream gradients of the log-prob, the entropy, the
    nucleus entropy (INSIDE) and the nucleus log-prob (TARGET), each read only where there is one."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits + row * token_stride + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
    numbers += row * NUMBERS
    factor = tl.load(scale + row * scale_stride)
    maximum = tl.load(numbers)
    total = tl.load(numbers + 1)
    at_target = 0.0
    if LOGPROB:
        at_target = tl.load(g_logprob + row * s_logprob)
    a = at_target
    b = 0.0
    if ENTROPY:
        g = tl.load(g_entropy + row * s_entropy)
        a += g * (tl.load(numbers + 2) - tl.log(total))
        b = -factor / total * g
    a = -factor / total * a
    d = clamped((x - maximum) * factor)
    e = tl.exp2(d * LOG2E)
    slope = a + b * d if ENTROPY else a
    if INSIDE or TARGET:
        theta = tl.load(numbers + 4)
        some = tl.load(numbers + 7) > 1  # an empty nucleus has no gradient, and that of a certain token vanishes
        mass = tl.where(some, tl.load(numbers + 5), 1.0)
        weight = tl.where(some, -factor / mass, 0.0)
        a_n = 0.0
        b_n = 0.0
        if INSIDE:
            g = tl.load(g_inside + row * s_inside)
            a_n = g * (tl.load(numbers + 6) - tl.log(mass))
            b_n = weight * g
        if TARGET:
            logit = tl.load(numbers + 3)
            hit = (logit >= theta) & (logit > -float("inf")) if KEEP_EQUAL else logit > theta
            g = tl.where(hit & some, tl.load(g_target + row * s_target), 0.0)
            a_n += g
            at_target += g
        inside = (x >= theta) & (x > -float("inf")) if KEEP_EQUAL else x > theta
        slope += tl.where(inside, weight * a_n + b_n * d, 0.0)
    gradient = e * slope
    gradient += tl.where(offset == tl.load(targets + row) - first_column, factor * at_target, 0.0)
    gradient = tl.where(offset < V, gradient, 0.0)
    tl.store(out + row * out_stride + offset, gradient.to(out.dtype.element_ty), mask=offset < width)

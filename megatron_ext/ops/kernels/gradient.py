"""The backward: one pass that reads the logits and writes their gradient, over them if asked to.

With d = (x - m) / T the gradient of a token's logits is

    dx_j = e^d_j (a + b d_j) + 1[j in nucleus] e^d_j (a_n + b_n d_j) + 1[j = target] at_target

and every program makes the six numbers of its token from the saved ones (columns.py) and the upstream gradients.
The mass of a nucleus has a term in a and one in a_n.
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from megatron_ext.ops.kernels.columns import ENTROPY, MASS, MAXIMUM, NUCLEUS_ENTROPY, SIZE, TARGET, THETA, TOTAL
from megatron_ext.ops.kernels.keys import LOG2E, clamped

COLUMNS = 4096
WARPS = 8


@triton.jit
def gradient_kernel(
    logits, token_stride, targets, first_column, scale, scale_stride, numbers, out, out_stride, V, width,
    g_logprob, s_logprob, g_entropy, s_entropy, g_inside, s_inside, g_target, s_target, g_mass, s_mass,
    OF_LOGPROB: tl.constexpr, OF_ENTROPY: tl.constexpr, OF_INSIDE: tl.constexpr, OF_TARGET: tl.constexpr,
    OF_MASS: tl.constexpr, KEEP_EQUAL: tl.constexpr, NUMBERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program a block of a token's columns. ``g_*`` with stride ``s_*``: upstream gradients of the log-prob, the
    entropy, the nucleus' entropy (inside), log-prob (target) and mass, each read only where there is one."""
    token = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(logits + token * token_stride + offset, mask=offset < V, other=-float("inf")).to(tl.float32)
    numbers += token * NUMBERS
    factor = tl.load(scale + token * scale_stride)
    maximum = tl.load(numbers + MAXIMUM)
    total = tl.load(numbers + TOTAL)
    at_target = 0.0
    if OF_LOGPROB:
        at_target = tl.load(g_logprob + token * s_logprob)
    a = at_target
    b = 0.0
    if OF_ENTROPY:
        g = tl.load(g_entropy + token * s_entropy)
        a += g * (tl.load(numbers + ENTROPY) - tl.log(total))
        b = -factor / total * g
    share = 0.0
    if OF_MASS:
        share = tl.load(g_mass + token * s_mass) / total
        a += share * tl.load(numbers + MASS)
    a = -factor / total * a
    d = clamped((x - maximum) * factor)
    e = tl.exp2(d * LOG2E)
    slope = a + b * d if OF_ENTROPY else a
    if OF_INSIDE or OF_TARGET or OF_MASS:
        theta = tl.load(numbers + THETA)
        some = tl.load(numbers + SIZE) > 1  # an empty nucleus has no gradient, and that of a certain token vanishes
        mass = tl.where(some, tl.load(numbers + MASS), 1.0)
        weight = tl.where(some, -factor / mass, 0.0)
        a_n = 0.0
        b_n = 0.0
        if OF_INSIDE:
            g = tl.load(g_inside + token * s_inside)
            a_n = g * (tl.load(numbers + NUCLEUS_ENTROPY) - tl.log(mass))
            b_n = weight * g
        if OF_TARGET:
            logit = tl.load(numbers + TARGET)
            hit = (logit >= theta) & (logit > -float("inf")) if KEEP_EQUAL else logit > theta
            g = tl.where(hit & some, tl.load(g_target + token * s_target), 0.0)
            a_n += g
            at_target += g
        inside = (x >= theta) & (x > -float("inf")) if KEEP_EQUAL else x > theta
        slope += tl.where(inside, weight * a_n + factor * share + b_n * d, 0.0)
    gradient = e * slope
    gradient += tl.where(offset == tl.load(targets + token) - first_column, factor * at_target, 0.0)
    gradient = tl.where(offset < V, gradient, 0.0)
    tl.store(out + token * out_stride + offset, gradient.to(out.dtype.element_ty), mask=offset < width)

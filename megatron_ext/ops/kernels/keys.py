"""Floats as integers in the same order, inside kernels: what the nucleus is searched by.

A key of fp32 is its bits, those of negative numbers mirrored, so that consecutive floats have consecutive keys and
0.0 and -0.0 the same one. A bf16 value has the low 16 bits 0: its short key is the upper half.
"""

# pyright: reportMissingImports=false
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
NOTHING: tl.constexpr = tl.constexpr(-32768)  # a short key below that of minus infinity


@triton.jit
def order_key(x):
    """fp32 to int32."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def from_order_key(key):
    """int32 to fp32."""
    return tl.where(key < 0, -2147483648 - key, key).to(tl.float32, bitcast=True)


@triton.jit
def short_key(x):
    """fp32 that holds a bf16 value to int32 in [-32640, 32640]."""
    return order_key(x) >> 16


@triton.jit
def from_short_key(key):
    """int32 to fp32; minus infinity for everything below its key."""
    return tl.where(key > -32640, from_order_key(key << 16), -float("inf"))


@triton.jit
def clamped(x):
    """``x``, or -1e30 where it is lower: minus infinity would make a NaN of a product with 0. NaN stays."""
    return tl.where(x < -1e30, -1e30, x)

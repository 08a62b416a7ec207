"""Steps of a layer for which torch has no kernel of its own on a CPU, each written out with its backward.

Left to autograd, each of them is a chain of operations that keeps and reads every intermediate result. Here forward
makes the same operations in the same order, so the same bits; backward makes fewer, and agrees to rounding.

    rms_norm      x / sqrt(mean x^2 + eps) * weight            x [..., D], weight [D]
    swiglu        silu(gate) * up                              [..., 2 F] = gate and up side by side -> [..., F]
    rotate        x cos + rotate_half(x) sin                   x [S, heads, R], cos and sin [S, 1, R]
    put, take     rows to the slots of a longer tensor, and back; a slot is used at most once
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    """Saves x, weight and the inverse root mean square ``[..., 1]``, the latter in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        x, weight, inverse = ctx.saved_tensors
        gradient, wide_weight = gradients[0].float(), weight.float()
        normed = x.float() * inverse
        product = (gradient * normed).view(-1, len(weight))
        along = (product @ wide_weight).view(inverse.shape).mul_(inverse).div_(-len(weight))
        of_x = (gradient * wide_weight).mul_(inverse).addcmul_(normed, along)
        return of_x.to(x.dtype), product.sum(0).to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """Saves its input and silu(gate) ``[..., F]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        active = F.silu(gate)
        ctx.save_for_backward(x, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore
        x, active = ctx.saved_tensors
        [gradient] = gradients
        gate, up = x.chunk(2, -1)
        of_x = torch.empty_like(x)
        of_gate, of_up = of_x.chunk(2, -1)
        torch.mul(gradient, active, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return of_x


class _Rotate(torch.autograd.Function):
    """Saves cos and sin. Its backward is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


class _Put(torch.autograd.Function):
    """Saves the slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        [slots] = ctx.saved_tensors
        return gradients[0].index_select(0, slots), None, None


class _Take(torch.autograd.Function):
    """Saves the slots."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.count = len(x)
        return x.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        [gradient], [slots] = gradients, ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, slots, gradient), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def swiglu(x: Tensor) -> Tensor:
    return _SwiGLU.apply(x)  # pyright: ignore[reportReturnType]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def put(x: Tensor, slots: Tensor, count: int) -> Tensor:
    """``[S, ...] -> [count, ...]``: row i stands in ``slots[i]``, zeros elsewhere."""
    return _Put.apply(x, slots, count)  # pyright: ignore[reportReturnType]


def take(x: Tensor, slots: Tensor) -> Tensor:
    """``[count, ...] -> [S, ...]``: row i is that of ``slots[i]``."""
    return _Take.apply(x, slots)  # pyright: ignore[reportReturnType]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos  # the products are rounded before they are added, as in the eager chain
    out[..., :half] -= x[..., half:] * sin[..., :half]
    out[..., half:] += x[..., :half] * sin[..., half:]
    return out

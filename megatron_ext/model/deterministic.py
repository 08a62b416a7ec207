"""Layers whose bits do not depend on the tensor-parallel size: ``model.deterministic``, on a CPU, in fp32.

Heads, feed-forward columns and vocabulary are cut into as many blocks as the largest tensor-parallel size that the
model allows (config/deterministic_checks.py), under every layout:

    column-parallel   a product for each block; the gradient of the input is the blocks' products in a fixed tree
    row-parallel      a product for each block of the input, the blocks' products in a fixed tree
    attention         a call for each block of heads
    norms of heads    a block at a time; the weight's gradient is the blocks' in a fixed tree
    SwiGLU            an exponential that knows no position
    gradient norm     a sum of integers

What is left works on full hidden states, the same on every rank (norms, residual stream), adds zeros (the embedding's
sum over ranks), or rounds each element by itself (rotary embedding, AdamW). One thread: torch and MKL split sums over
threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ext.config.deterministic_checks import num_blocks
from megatron_ext.model import groups
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.layers import PackedAttention, RMSNorm
from megatron_ext.ops import blocks
from megatron_ext.ops.deterministic import exponential

COUNT_BITS = 34  # of the number of a model's parameters, at most


def install(module: torch.nn.Module, architecture: Architecture) -> None:
    """Make the layers of one pipeline stage deterministic, and this process single-threaded."""
    torch.set_num_threads(1)
    a, group = architecture, groups.tensor()
    own = num_blocks(a.num_heads, a.num_groups, a.ffn_size, a.vocab_size) // group.size()
    for name, child in module.named_modules():
        layer: Any = child
        if isinstance(child, ColumnParallelLinear):
            gated = 2 if name.endswith("linear_fc1") else 1  # gate and up projections lie one after the other
            layer._forward_impl = partial(_column_product, leaves=_leaves(child.output_size_per_partition, own, gated))
        elif isinstance(child, RowParallelLinear):
            layer.forward = partial(_row_product, child, leaves=_leaves(child.input_size_per_partition, own))
        elif isinstance(child, PackedAttention):
            layer.forward = partial(_attention, child.forward, own)
        elif isinstance(child, RMSNorm) and name.endswith(("q_layernorm", "k_layernorm")):
            layer.forward = partial(_head_norm, child, own)


def install_norm(optimizer: MegatronOptimizer) -> None:
    """Make the gradient's norm, by which it is clipped, deterministic."""
    chained: Any = optimizer
    chained.get_grad_norm = partial(_optimizer_norm, chained)


def silu(x: Tensor) -> Tensor:
    return _Silu.apply(x)


def norm(values: list[Tensor], group: dist.ProcessGroup) -> float:
    """The 2-norm of all ranks' values together, in any order and split; infinity where one is not finite.

    Squares are counted in units of 2^-56 of the largest one's power of two: two integers, to be added in any order.
    """
    flat = [value.flatten() for value in values if value.numel()]
    largest = torch.stack([value.abs().amax() for value in flat]).amax() if flat else torch.zeros(())
    largest = largest.double().nan_to_num(nan=math.inf, posinf=math.inf)[None]
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    top = float(largest)
    if top == 0 or math.isinf(top):
        return top
    bits, exponent = 62 - COUNT_BITS, math.frexp(top)[1]
    counts = torch.zeros(2, dtype=torch.int64)
    for value in flat:
        square = (value.double() * 2.0**-exponent).square_().mul_(2.0**bits)
        high = square.round()
        counts[0] += high.long().sum()
        counts[1] += (square - high).mul_(2.0**bits).round_().long().sum()
    dist.all_reduce(counts, group=group)
    high, low = counts.tolist()
    return math.ldexp(math.sqrt(math.ldexp(high, -bits) + math.ldexp(low, -2 * bits)), exponent)


def _optimizer_norm(optimizer: Any) -> float:
    gradients = [each.get_main_grads_for_grad_norm() for each in optimizer.chained_optimizers]
    return norm([grad for part in gradients for grad in part], optimizer.get_grad_stats_parallel_group())


def _leaves(size: int, own: int, parts: int = 1) -> list[blocks.Leaf]:
    """This rank's ``own`` blocks of a dimension, each with its share of every part."""
    part, width = size // parts, size // parts // own
    return [[slice(p * part + i * width, p * part + (i + 1) * width) for p in range(parts)] for i in range(own)]


def _column_product(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, leaves: list[blocks.Leaf], **_unused: Any
) -> Tensor:
    return _ColumnProduct.apply(input, weight, bias, leaves)


def _row_product(layer: RowParallelLinear, input: Tensor, *, leaves: list[blocks.Leaf]) -> tuple[Tensor, None]:
    assert layer.bias is None and layer.input_is_parallel
    return _RowProduct.apply(input, layer.weight, leaves), None


def _attention(attend: Callable[..., Tensor], own: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more):
    heads = zip(*(x.chunk(own, 1) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*(x.contiguous() for x in block), *rest, **more) for block in heads], -1)


def _head_norm(layer: RMSNorm, own: int, x: Tensor) -> Tensor:
    return _HeadNorm.apply(x, layer.weight, layer.eps, own)


class _ColumnProduct(torch.autograd.Function):
    """``x [..., K] @ weight [N/TP, K]^T + bias``; the gradient of x is that over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaves: list[blocks.Leaf]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaves = leaves
        out = blocks.product(x.flatten(0, -2), weight, leaves)
        return (out if bias is None else out + bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        d_out, flat, d_weight, d_bias = upstream[0].flatten(0, -2), x.flatten(0, -2), None, None
        d_x = blocks.input_gradient(d_out, weight, ctx.leaves, groups.tensor()).view_as(x)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
            blocks.weight_gradient(d_out, flat, ctx.leaves, d_weight)
        if ctx.needs_input_grad[2]:
            d_bias = d_out.new_empty(len(weight))
            for rows in (rows for leaf in ctx.leaves for rows in leaf):
                d_bias[rows] = d_out[:, rows].contiguous().sum(0)
        return d_x, d_weight, d_bias, None


class _RowProduct(torch.autograd.Function):
    """``x [..., K/TP] @ weight [N, K/TP]^T`` over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, leaves: list[blocks.Leaf]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaves, flat = leaves, x.flatten(0, -2)
        parts = [flat[:, k].contiguous() @ weight[:, k].contiguous().T for [k] in leaves]
        return blocks.tree_sum(parts, groups.tensor()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        d_out, flat = upstream[0].flatten(0, -2).contiguous(), x.flatten(0, -2)
        d_x, d_weight = torch.empty_like(flat), torch.empty_like(weight)
        for [k] in ctx.leaves:
            d_x[:, k] = d_out @ weight[:, k].contiguous()
            if ctx.needs_input_grad[1]:
                d_weight[:, k] = d_out.T @ flat[:, k].contiguous()
        return d_x.view_as(x), d_weight if ctx.needs_input_grad[1] else None, None


class _HeadNorm(torch.autograd.Function):
    """The RMSNorm of every head of ``x [..., heads/TP, head_dim]``, with one weight for all heads.

    Megatron adds the ranks' gradients of this weight: rank 0 has all of it, the others zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, own: int) -> Tensor:
        ctx.eps, ctx.own = eps, own
        ctx.save_for_backward(x, weight)
        return torch.cat([part * _inverse_rms(part, eps) * weight for part in _parts(x, own)], -2)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        d_x, d_weight = [], []
        for part, d_out in zip(_parts(x, ctx.own), _parts(upstream[0], ctx.own), strict=True):
            inverse = _inverse_rms(part, ctx.eps)
            unit, d_unit = part * inverse, d_out * weight
            d_x.append((d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * inverse)
            d_weight.append((d_out * unit).flatten(0, -2).sum(0))
        total = blocks.tree_sum(d_weight, groups.tensor())
        return torch.cat(d_x, -2), total if groups.tensor().rank() == 0 else torch.zeros_like(total), None, None


def _parts(x: Tensor, own: int) -> list[Tensor]:
    return [part.contiguous() for part in x.chunk(own, -2)]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class _Silu(torch.autograd.Function):
    """x / (1 + e^-x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * _sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        [x] = ctx.saved_tensors
        sigmoid = _sigmoid(x)
        return upstream[0] * (sigmoid * ((1 - sigmoid) * x + 1))


def _sigmoid(x: Tensor) -> Tensor:
    e = exponential(-x.abs())
    return torch.where(x >= 0, 1, e) / (1 + e)

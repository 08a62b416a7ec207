"""Policy statistics straight from hidden states and the output weight: the logits of all tokens never exist at once.

    logits = hidden @ weight^T      hidden [T, D], weight [V/TP, D] (this rank's part of the output layer)

Forward: for each chunk of tokens one GEMM and the work of policy_stats, exchange included, then the chunk's logits are
dropped. Backward: for each chunk the GEMM again, the gradient written over its logits, then

    d_hidden = d_logits @ weight, summed over the group        d_weight = d_logits^T @ hidden, accumulated in fp32

Four GEMMs instead of three: for when 2 * T * V / TP bytes of logits do not fit. With ``sequence_parallel`` hidden is
this rank's ``[T / TP, D]`` of the tokens: it is gathered forward and again backward, and d_hidden is reduce-scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops import blocks, support_stats
from megatron_ext.ops.collectives import all_gather, group_size, reduce_scatter, sum_over_ranks
from megatron_ext.ops.options import (
    NUM_CANDIDATES,
    Options,
    PolicyStats,
    checked_options,
    given,
    inverse_temperature,
    join,
    returned,
    without_gradient,
)
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.support import Support

CHUNK_BYTES = 1 << 29  # of logits that exist at once: fewer chunks as tensor parallelism narrows the shard


def chunk_tokens(width: int, element_bytes: int) -> int:
    """Tokens whose logits :func:`linear_policy_stats` holds at once, of a shard ``width`` columns wide."""
    return max(1, CHUNK_BYTES // (width * element_bytes))


def linear_policy_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | None = None,
    min_p: float | None = None,
    nucleus: str = "inclusive",
    want: Sequence[str] = ("logprob", "entropy"),
    grad: Sequence[str] = ("logprob",),
    num_candidates: int = NUM_CANDIDATES,
    support: Support | None = None,
    sequence_parallel: bool = False,
    chunk: int | None = None,
    main_grad: Tensor | None = None,
    deterministic: bool = False,
) -> PolicyStats:
    """``policy_stats(hidden @ weight.T, targets, shard, ...)``, with gradients for hidden and weight.

    Args:
        hidden: ``[T, D]`` bf16, fp32 or fp64, the same on every rank of the group, before any upcast; with
            ``sequence_parallel`` this rank's ``[T / TP, D]``.
        weight: ``[shard.width, D]`` in the dtype of hidden.
        targets: ``[T]`` int64, global token ids (of all tokens, also with ``sequence_parallel``).
        shard: the columns of the logits, rows of ``weight``, that this rank holds; None: all of the vocabulary.
        chunk: tokens whose logits exist at once; None: as many as CHUNK_BYTES hold.
        main_grad: fp32 ``[shard.width, D]`` that the gradient of the weight is added to, chunk by chunk; autograd then
            gets zeros in its place.
        deterministic: as for :func:`policy_stats`; the products are of blocks of the vocabulary (blocks.py), so the
            shard must not cut one. The same number of threads, no ``sequence_parallel``.

    The other arguments, the outputs and the errors are those of :func:`policy_stats`. Without ``main_grad`` the
    gradient of the weight is summed in fp32 over the chunks, then rounded to the weight's dtype; the sum over
    data-parallel ranks is the caller's.
    """
    shard = VocabShard.for_vocab(len(weight)) if shard is None else shard
    if hidden.ndim != 2 or weight.shape != (shard.width, hidden.shape[1]) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_policy_stats: hidden is {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} "
            f"{list(weight.shape)}, expected [T, D] and [{shard.width}, D] of one dtype for {shard}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_policy_stats: chunk is {chunk}, expected at least 1 token")
    T = len(hidden) * (group_size(shard.group) if sequence_parallel else 1)
    options = checked_options(
        "linear_policy_stats", T=T, dtype=hidden.dtype, shard=shard, targets=targets, temperature=temperature,
        top_p=top_p, min_p=min_p, nucleus=nucleus, want=want, grad=grad, num_candidates=num_candidates, support=support,
        deterministic=deterministic,
    )  # fmt: skip
    scale, support = inverse_temperature(temperature, T, hidden), support if options.over_support else None
    if deterministic and sequence_parallel:
        raise ValueError("linear_policy_stats: deterministic=True takes no sequence_parallel; gather the tokens first")
    leaves = blocks.vocabulary(shard, "linear_policy_stats") if deterministic else None
    width = shard.vocab_size if deterministic else shard.width  # as many tokens at once under every layout
    chunk = chunk or chunk_tokens(width, hidden.element_size())
    return PolicyStats(
        *_LinearPolicyStatsFunction.apply(
            hidden, weight, targets, scale, support, options, sequence_parallel, chunk, main_grad, leaves
        )
    )


class _LinearPolicyStatsFunction(torch.autograd.Function):
    """T tokens, W = V/TP columns of this rank, C tokens a chunk; * means [T/TP, D] with sequence_parallel.

    tensor                shape        dtype             forward                  backward
    hidden                [T, D]*      bf16, fp32, fp64  read                     read
    weight                [W, D]       that of hidden    read once a chunk        read twice a chunk
    targets, scale        [T], [T, 1]  int64, fp32 (1)   read                     read
    support               [N], [T+1]   int64             read                     read
    each wanted output    [T]          fp32 (1)          written                  its upstream gradient is read
    logits                [C, W]       that of hidden    made, read, dropped      made, the gradient written over them
    gradient of hidden    [T, D]*      that of hidden    -                        written once
    gradient of weight    [W, D]       fp32 (1)          -                        added to once a chunk: ``main_grad``

    Saved: hidden, weight, targets and scale as they are (no copy), and what _PolicyStatsFunction saves besides logits.

    Collectives over the shard's group: forward those of _PolicyStatsFunction once a chunk; backward one all-reduce of
    the gradient of hidden. With sequence_parallel an all-gather of hidden in each, and a reduce-scatter for the
    all-reduce.

    (1) fp64 for fp64 hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        support: Support | None,
        options: Options,
        sequence_parallel: bool,
        chunk: int,
        main_grad: Tensor | None,
        leaves: list[blocks.Leaf] | None,
    ) -> tuple:
        everything, parts = _all_tokens(hidden, options.shard, sequence_parallel), []
        for index, own in _chunks(len(targets), chunk, support):
            logits = _logits(everything[index], weight, leaves)
            parts.append(support_stats.forward(logits, targets[index], scale[index], own, options))
        found = join(parts)
        outputs = returned(found, options)
        ctx.options, ctx.sequence_parallel, ctx.chunk, ctx.main_grad = options, sequence_parallel, chunk, main_grad
        ctx.has_support, ctx.leaves = support is not None, leaves
        ctx.save_for_backward(hidden, weight, targets, scale, *(support or ()), *found.saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*without_gradient(outputs, options))
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, scale, *saved = ctx.saved_tensors
        support, saved = (Support(*saved[:2]), saved[2:]) if ctx.has_support else (None, saved)
        options, shard = ctx.options, ctx.options.shard
        gradients = given(upstream, options)
        everything = _all_tokens(hidden, shard, ctx.sequence_parallel)
        d_hidden, d_weight = torch.empty_like(everything), ctx.main_grad
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=scale.dtype)
        for index, own in _chunks(len(targets), ctx.chunk, support):
            logits = _logits(everything[index], weight, ctx.leaves)
            part = tuple(value[index] for value in saved)
            upstream_of = {name: value[index] for name, value in gradients.items()}
            support_stats.backward(logits, targets[index], scale[index], part, upstream_of, own, options, logits)
            if ctx.leaves is not None:
                d_hidden[index] = blocks.input_gradient(logits, weight, ctx.leaves, shard.group)
            else:
                torch.mm(logits, weight, out=d_hidden[index])
            if d_weight is not None and ctx.leaves is not None:
                blocks.weight_gradient(logits, everything[index], ctx.leaves, d_weight)
            elif d_weight is not None:
                _accumulate(d_weight, logits, everything[index])
        if ctx.sequence_parallel:
            d_hidden = reduce_scatter(d_hidden, shard.group)
        elif ctx.leaves is None:  # else each chunk's is the sum already
            d_hidden = sum_over_ranks(d_hidden, shard.group)
        if ctx.main_grad is not None:
            d_weight = torch.zeros_like(weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *[None] * 8


def _logits(hidden: Tensor, weight: Tensor, leaves: list[blocks.Leaf] | None) -> Tensor:
    return hidden @ weight.T if leaves is None else blocks.product(hidden, weight, leaves)


def _all_tokens(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    return all_gather(hidden, shard.group).flatten(0, 1) if sequence_parallel else hidden


def _chunks(T: int, chunk: int, support: Support | None) -> list[tuple[slice, Support | None]]:
    """The tokens of every chunk, and their part of the support."""
    tokens = [slice(start, min(start + chunk, T)) for start in range(0, max(T, 1), chunk)]
    return list(zip(tokens, support.split(chunk) if support else [None] * len(tokens), strict=True))


def _accumulate(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``d_weight += d_logits^T @ hidden`` with products and sums in the dtype of ``d_weight``."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    elif d_logits.device.type != "cpu":  # the GEMM adds to its output: no second tensor of the weight's size
        torch.ops.aten.addmm.dtype_out(d_weight, d_logits.T, hidden, d_weight.dtype, out=d_weight)
    else:
        d_weight.addmm_(d_logits.T.to(d_weight.dtype), hidden.to(d_weight.dtype))

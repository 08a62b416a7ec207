"""Policy statistics straight from hidden states and the output weight: the logits of all rows never exist at once.

    logits = hidden @ weight^T      hidden [T, D], weight [V/TP, D] (this rank's rows of the output layer)

Forward: for each chunk of rows one GEMM and the work of policy_stats, exchange included, then the chunk's logits are
dropped. Backward: for each chunk the GEMM again, the gradient written over its logits, then

    d_hidden = d_logits @ weight, summed over the group        d_weight = d_logits^T @ hidden, accumulated in fp32

Four GEMMs instead of three: for when 2 * T * V / TP bytes of logits do not fit. With ``sequence_parallel`` hidden is
this rank's ``[T / TP, D]`` of the rows: it is gathered forward and again backward, and d_hidden is reduce-scattered.
Saved: hidden and weight, which the caller keeps anyway, and the row numbers of policy_stats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops.backend import implementation
from megatron_ext.ops.collectives import all_gather, group_size, reduce_scatter, sum_over_ranks
from megatron_ext.ops.options import (
    NUCLEUS,
    NUM_CANDIDATES,
    NucleusRule,
    Options,
    PolicyStats,
    check,
    given,
    inverse_temperature,
    join,
    returned,
    without_gradient,
)
from megatron_ext.ops.shard import VocabShard

CHUNK_BYTES = 1 << 29  # of logits that exist at once: fewer chunks as tensor parallelism narrows the shard


def chunk_tokens(width: int, element_bytes: int) -> int:
    """Rows of logits of a shard ``width`` columns wide that :func:`linear_policy_stats` holds at once."""
    return max(1, CHUNK_BYTES // (width * element_bytes))


def linear_policy_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | None = None,
    nucleus: str = "inclusive",
    want: Sequence[str] = ("logprob", "entropy"),
    grad: Sequence[str] = ("logprob",),
    num_candidates: int = NUM_CANDIDATES,
    sequence_parallel: bool = False,
    chunk: int | None = None,
    main_grad: Tensor | None = None,
) -> PolicyStats:
    """:func:`policy_stats` of ``hidden @ weight^T``, with gradients for hidden and weight.

    Args:
        hidden: ``[rows, D]`` bf16, fp32 or fp64, the same on every rank of the group, before any upcast; with
            ``sequence_parallel`` this rank's ``[rows / TP, D]``.
        weight: ``[shard.width, D]`` in the dtype of hidden.
        targets: ``[rows]`` int64, global token ids (all rows, also with ``sequence_parallel``).
        chunk: rows whose logits exist at once; None: as many as CHUNK_BYTES hold.
        main_grad: fp32 ``[shard.width, D]`` that the gradient of the weight is added to, chunk by chunk; autograd then
            gets zeros in its place.

    The other arguments, the outputs and the errors are those of :func:`policy_stats`. Without ``main_grad`` the
    gradient of the weight is summed in fp32 over the chunks, then rounded to the weight's dtype; the sum over
    data-parallel ranks is the caller's.
    """
    if hidden.ndim != 2 or weight.shape != (shard.width, hidden.shape[1]) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_policy_stats: hidden is {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} "
            f"{list(weight.shape)}, expected [rows, D] and [{shard.width}, D] of one dtype for {shard}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_policy_stats: chunk is {chunk}, expected at least 1 row")
    rule = NucleusRule(top_p, nucleus) if top_p is not None and any(name in NUCLEUS for name in want) else None
    options = Options(shard, rule, tuple(want), tuple(grad), num_candidates)
    T = len(hidden) * (group_size(shard.group) if sequence_parallel else 1)
    check("linear_policy_stats", T, hidden.dtype, targets, temperature, options, top_p, nucleus)
    scale = inverse_temperature(temperature, T, hidden)
    rows = chunk or chunk_tokens(shard.width, hidden.element_size())
    return PolicyStats(
        *_LinearPolicyStatsFunction.apply(hidden, weight, targets, scale, options, sequence_parallel, rows, main_grad)
    )


class _LinearPolicyStatsFunction(torch.autograd.Function):
    """
    saved       [T, D] hidden ([T/TP, D] with sequence_parallel), [V/TP, D] weight: the caller's tensors
                what policy_stats saves besides the logits
    forward     a GEMM a chunk; gathers hidden with sequence_parallel; the exchange of policy_stats a chunk
    backward    three GEMMs a chunk; gathers hidden again; sums d_hidden over the group once
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        options: Options,
        sequence_parallel: bool,
        chunk: int,
        main_grad: Tensor | None,
    ) -> tuple:
        everything, parts = _all_tokens(hidden, options.shard, sequence_parallel), []
        for index in _chunks(len(targets), chunk):
            logits = everything[index] @ weight.T
            parts.append(implementation(logits).forward(logits, targets[index], scale[index], options))
        found = join(parts)
        outputs = returned(found, options)
        ctx.options, ctx.sequence_parallel, ctx.chunk, ctx.main_grad = options, sequence_parallel, chunk, main_grad
        ctx.save_for_backward(hidden, weight, targets, scale, *found.saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*without_gradient(outputs, options))
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, scale, *saved = ctx.saved_tensors
        options, shard = ctx.options, ctx.options.shard
        gradients = given(upstream, options)
        everything = _all_tokens(hidden, shard, ctx.sequence_parallel)
        d_hidden, d_weight = torch.empty_like(everything), ctx.main_grad
        if d_weight is None and ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=scale.dtype)
        for index in _chunks(len(targets), ctx.chunk):
            logits = everything[index] @ weight.T
            part = tuple(value[index] for value in saved)
            own = {name: value[index] for name, value in gradients.items()}
            implementation(logits).backward(logits, targets[index], scale[index], part, own, options, logits)
            torch.mm(logits, weight, out=d_hidden[index])
            if d_weight is not None:
                _accumulate(d_weight, logits, everything[index])
        if ctx.sequence_parallel:
            d_hidden = reduce_scatter(d_hidden, shard.group)
        else:
            d_hidden = sum_over_ranks(d_hidden, shard.group)
        if ctx.main_grad is not None:
            d_weight = torch.zeros_like(weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *[None] * 6


def _all_tokens(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    return all_gather(hidden, shard.group).flatten(0, 1) if sequence_parallel else hidden


def _chunks(T: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, T)) for start in range(0, max(T, 1), chunk)]


def _accumulate(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``d_weight += d_logits^T @ hidden`` with products and sums in the dtype of ``d_weight``."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    elif d_logits.device.type != "cpu":  # the GEMM adds to its output: no second tensor of the weight's size
        torch.ops.aten.addmm.dtype_out(d_weight, d_logits.T, hidden, d_weight.dtype, out=d_weight)
    else:
        d_weight.addmm_(d_logits.T.to(d_weight.dtype), hidden.to(d_weight.dtype))

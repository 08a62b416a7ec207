"""Policy statistics straight from hidden states and the output weight: the logits of all rows never exist at once.

    logits = hidden @ weight^T      hidden [T, D], weight [V/TP, D] (this rank's rows of the output layer)

Forward: for each chunk of rows one GEMM, the row work of policy_stats, and the chunk's logits are dropped; the exchange
is one for all chunks. Backward: for each chunk the GEMM again, the gradient written over its logits, then

    d_hidden = d_logits @ weight, summed over the group        d_weight = d_logits^T @ hidden, accumulated in fp32

Four GEMMs instead of three: for when 2 * T * V / TP bytes of logits do not fit. With ``sequence_parallel`` hidden is
this rank's ``[T / TP, D]`` of the rows: it is gathered forward and again backward, and d_hidden is reduce-scattered.
Saved: hidden and weight, which the caller keeps anyway, and at most eight numbers a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops.backend import row_work
from megatron_ext.ops.collectives import all_gather, group_size, sum_over_ranks, sum_own_rows
from megatron_ext.ops.nucleus import Rule
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.stats import (
    NUCLEUS,
    WINDOW,
    Options,
    PolicyStats,
    check,
    finish,
    local_columns,
    row_gradient,
    row_scale,
)
from megatron_ext.ops.window import Window

CHUNK = 1024  # rows whose logits exist at once


def linear_policy_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | None = None,
    nucleus: str = "reach",
    want: Sequence[str] = ("logprob", "entropy"),
    grad: Sequence[str] = ("logprob",),
    ties: str = "all",
    window: int = WINDOW,
    sequence_parallel: bool = False,
    chunk: int = CHUNK,
) -> PolicyStats:
    """:func:`policy_stats` of ``hidden @ weight^T``, with gradients for hidden and weight.

    Args:
        hidden: ``[rows, D]`` bf16, fp32 or fp64, the same on every rank of the group, before any upcast; with
            ``sequence_parallel`` this rank's ``[rows / TP, D]``.
        weight: ``[shard.width, D]`` in the dtype of hidden.
        targets: ``[rows]`` int64, global token ids (all rows, also with ``sequence_parallel``).
        chunk: rows whose logits exist at once.

    The other arguments, the outputs and the errors are those of :func:`policy_stats`. Rows the windows cannot decide
    (slow rows) cost their chunk's logits once more. The gradient of the weight is summed in fp32 over the chunks, then
    rounded to the weight's dtype; the sum over data-parallel ranks is the caller's.
    """
    if hidden.ndim != 2 or weight.shape != (shard.width, hidden.shape[1]) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_policy_stats: hidden is {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} "
            f"{list(weight.shape)}, expected [rows, D] and [{shard.width}, D] of one dtype for {shard}"
        )
    if chunk < 1:
        raise ValueError(f"linear_policy_stats: chunk is {chunk}, expected at least 1 row")
    rule = Rule(top_p, nucleus, ties) if top_p is not None and any(name in NUCLEUS for name in want) else None
    options = Options(shard, rule, tuple(want), tuple(grad), window)
    T = len(hidden) * (group_size(shard.group) if sequence_parallel else 1)
    check(T, hidden.dtype, targets, temperature, options, top_p, nucleus, ties)
    scale = row_scale(temperature, T, hidden)
    outputs = _LinearPolicyStatsFunction.apply(hidden, weight, targets, scale, options, sequence_parallel, chunk)
    return PolicyStats(*outputs)


class _LinearPolicyStatsFunction(torch.autograd.Function):
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
    ) -> tuple:
        shard = options.shard
        everything = _all_rows(hidden, shard, sequence_parallel)
        columns, parts = local_columns(targets, shard), []
        for index in _chunks(len(targets), chunk):
            logits = everything[index] @ weight.T
            parts.append(
                row_work(logits).summarise(logits, columns[index], scale[index], shard.real, **options.summary)
            )
        sums = torch.cat([part[0] for part in parts])
        windows = [part[1] for part in parts if part[1] is not None]

        window = Window.join(windows) if windows else None
        outputs, cut, saved = finish(
            ctx, sums, window, _Recompute(everything, weight, shard, chunk), targets, scale, options
        )
        ctx.sequence_parallel, ctx.chunk = sequence_parallel, chunk
        ctx.save_for_backward(hidden, weight, targets, scale, cut, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, scale, cut, *saved = ctx.saved_tensors
        options, shard = ctx.options, ctx.options.shard
        row, columns = row_gradient(saved, scale, cut, upstream, options), local_columns(targets, shard)
        everything = _all_rows(hidden, shard, ctx.sequence_parallel)
        d_hidden = torch.empty_like(everything)
        d_weight = torch.zeros_like(weight, dtype=scale.dtype) if ctx.needs_input_grad[1] else None
        for index in _chunks(len(targets), ctx.chunk):
            logits = everything[index] @ weight.T
            row_work(logits).gradient(logits, columns[index], scale[index], shard.real, row.rows(index), logits)
            torch.mm(logits, weight, out=d_hidden[index])
            if d_weight is not None:
                _accumulate(d_weight, logits, everything[index])
        if ctx.sequence_parallel:
            d_hidden = sum_own_rows(d_hidden, shard.group)
        else:
            d_hidden = sum_over_ranks(d_hidden, shard.group)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None, None


class _Recompute:
    """Logits of any rows once more, to the bit: a product of other rows may round otherwise, and then the crossing's
    logit would not be found again in the backward. So whole chunks are multiplied, and the last one is kept."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard, chunk: int) -> None:
        self.hidden, self.weight, self.real, self.chunk = hidden, weight, shard.real, chunk
        self.at, self.logits = -1, hidden[:0]

    def __call__(self, index: Tensor) -> Tensor:
        parts = [self._of_chunk(at)[index[index // self.chunk == at] % self.chunk] for at in self._chunks_of(index)]
        return torch.cat(parts)[:, : self.real]

    def _chunks_of(self, index: Tensor) -> list[int]:
        return (index // self.chunk).unique().tolist()  # index ascends, so the parts are in its order

    def _of_chunk(self, at: int) -> Tensor:
        if at != self.at:
            self.at, self.logits = at, self.hidden[at * self.chunk : (at + 1) * self.chunk] @ self.weight.T
        return self.logits


def _all_rows(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    return all_gather(hidden, shard.group).flatten(0, 1) if sequence_parallel else hidden


def _chunks(T: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, T)) for start in range(0, max(T, 1), chunk)]


def _accumulate(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """``d_weight += d_logits^T @ hidden`` with products and sums in the dtype of ``d_weight``."""
    if d_logits.dtype == d_weight.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    elif d_logits.is_cuda:
        d_weight += torch.mm(d_logits.T, hidden, out_dtype=d_weight.dtype)
    else:
        d_weight.addmm_(d_logits.T.to(d_weight.dtype), hidden.to(d_weight.dtype))

"""Log-probability, entropy and nucleus (top-p) statistics of vocabulary-sharded logits, with gradient.

With z = logits / T, m the row maximum, S = sum e^(z-m), all over the whole vocabulary:

    log p = z - m - log S                    logprob = log p[target]
    H     = log S - sum e^(z-m) (z-m) / S    entropy
    V_p   = {z >= theta} (reach) or {z > theta} (below), theta the logit at which the mass reaches top_p
    q     = p / mass inside V_p              nucleus_entropy H_p = -sum q log q, nucleus_logprob = log q[target]

    dL/dlogits_j = 1/T [ g_lp (1[j=y] - p_j) - g_H p_j (log p_j + H)
                         + 1[j in V_p] ( g_nlp (1[j=y] - q_j) - g_Hp q_j (log q_j + H_p) ) ]

Membership in V_p is constant. The backward reads the logits and a few numbers a row, and exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops.backend import implementation
from megatron_ext.ops.options import (
    DIFFERENTIABLE,
    NUCLEUS,
    NUM_CANDIDATES,
    NucleusRule,
    Options,
    PolicyStats,
    check,
    given,
    inverse_temperature,
    returned,
    without_gradient,
)
from megatron_ext.ops.shard import VocabShard

__all__ = ["DIFFERENTIABLE", "NUCLEUS", "PolicyStats", "policy_stats"]


def policy_stats(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | None = None,
    nucleus: str = "inclusive",
    want: Sequence[str] = ("logprob", "entropy"),
    grad: Sequence[str] = ("logprob",),
    num_candidates: int = NUM_CANDIDATES,
    inplace_backward: bool = False,
) -> PolicyStats:
    """Statistics of the policy softmax(logits / temperature) at every row, exact over the whole vocabulary.

    Args:
        logits: ``[rows, shard.width]`` bf16, fp32 or fp64, raw (before temperature). Not written to.
        targets: ``[rows]`` int64, global token ids, the same on every rank of the group.
        shard: the columns this rank holds.
        temperature: a positive number, or ``[rows]``.
        top_p: the nucleus' mass, in (0, 1]; needed by the nucleus outputs. 1 takes the slow path for every row: the
            plain entropy is then the same and free.
        nucleus: ``inclusive`` keeps the token at which the mass reaches top_p, ``exclusive`` does not and may be empty
            (entropy 0, no gradient).
        want: names of the outputs to compute.
        grad: names of the wanted outputs that carry a gradient: logprob, entropy, nucleus_entropy, nucleus_logprob.
        window: logits of a row sent to its owner; more certify flatter rows.
        inplace_backward: the backward writes the gradient over ``logits``, for a buffer nobody else reads; a second
            backward then raises.

    Raises:
        ValueError: shapes, dtypes, names or numbers that do not fit.
    """
    if logits.ndim != 2 or logits.shape[1] != shard.width:
        raise ValueError(f"policy_stats: logits are {list(logits.shape)}, expected [rows, {shard.width}] for {shard}")
    rule = NucleusRule(top_p, nucleus) if top_p is not None and any(name in NUCLEUS for name in want) else None
    options = Options(shard, rule, tuple(want), tuple(grad), num_candidates)
    check("policy_stats", len(logits), logits.dtype, targets, temperature, options, top_p, nucleus)
    scale = inverse_temperature(temperature, len(logits), logits)
    return PolicyStats(*_PolicyStatsFunction.apply(logits, targets, scale, options, inplace_backward))


class _PolicyStatsFunction(torch.autograd.Function):
    """
    saved       [rows, V/TP]  logits, the caller's tensor: no copy
                [rows, 8]     fp32 numbers (4 without a nucleus): maximum, total, entropy, target's logit, theta, mass,
                              nucleus entropy, size; the portable path with a nucleus keeps [rows, 256] twice
    forward     reads the logits once; exchanges over the group as backend.py's implementation says
    backward    reads them once and writes as much, over them with ``inplace``; exchanges nothing
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: Tensor, options: Options, inplace: bool) -> tuple:
        found = implementation(logits).forward(logits, targets, scale, options)
        outputs = returned(found, options)
        ctx.options, ctx.inplace = options, inplace
        ctx.save_for_backward(logits, targets, scale, *found.saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*without_gradient(outputs, options))
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, scale, *saved = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        implementation(logits).backward(
            logits.detach(), targets, scale, tuple(saved), given(upstream, ctx.options), ctx.options, out
        )
        return out, None, None, None, None

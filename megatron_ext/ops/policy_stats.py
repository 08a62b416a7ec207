"""Log-probability, entropy and nucleus (top-p) statistics of vocabulary-sharded logits, with gradient.

With z = logits / T, m the maximum of a token's z, S = sum e^(z-m), all over the whole vocabulary:

    log p = z - m - log S                    logprob = log p[target]
    H     = log S - sum e^(z-m) (z-m) / S    entropy
    V_p   = {z >= theta} (inclusive) or {z > theta} (exclusive), theta the logit of the cutoff token, at which the
            descending cumulative mass reaches top_p; or, with min_p, theta = m + log min_p: p against min_p max p
    M     = sum of p inside V_p              nucleus_mass
    q     = p / M inside V_p                 nucleus_entropy H_p = -sum q log q, nucleus_logprob = log q[target]

    dL/dlogits_j = 1/T [ g_lp (1[j=y] - p_j) - g_H p_j (log p_j + H) - g_M M p_j
                         + 1[j in V_p] ( g_nlp (1[j=y] - q_j) - g_Hp q_j (log q_j + H_p) + g_M p_j ) ]

Membership in V_p is constant. The backward reads the logits and a few numbers a token, and exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops import support_stats
from megatron_ext.ops.options import (
    DIFFERENTIABLE,
    NUCLEUS,
    NUM_CANDIDATES,
    Options,
    PolicyStats,
    checked_options,
    given,
    inverse_temperature,
    returned,
    without_gradient,
)
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.support import Support

__all__ = ["DIFFERENTIABLE", "NUCLEUS", "PolicyStats", "policy_stats"]


def policy_stats(
    logits: Tensor,
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
    inplace_backward: bool = False,
    deterministic: bool = False,
) -> PolicyStats:
    """``logp = (logits / temperature).log_softmax(-1)``: ``logp[range(T), targets]``, ``-(logp.exp() * logp).sum(-1)``.

    Exact over a vocabulary that ranks share, without ever making ``logp`` or gathering logits; on request the same two
    of the nucleus, ``logp`` renormalised inside the top-p set, with its mass and size.

    Args:
        logits: ``[T, shard.width]`` bf16, fp32 or fp64, raw (before temperature). Not written to.
        targets: ``[T]`` int64, global token ids, the same on every rank of the group.
        shard: the columns this rank holds; None: all of the vocabulary.
        temperature: a positive number, or ``[T]``.
        top_p: the nucleus' mass, in (0, 1]; the nucleus outputs need it, or min_p. 1 takes the fallback for every
            token: the plain entropy is then the same and free.
        min_p: in (0, 1), in the place of top_p: the nucleus is the tokens whose probability is at least (inclusive) or
            above (exclusive) min_p times the likeliest one's. -log of its mass is then the KL divergence of the policy
            from what it is renormalised there, and p - q the gradient.
        nucleus: ``inclusive`` keeps the cutoff token, at which the mass reaches top_p; ``exclusive`` does not and may
            be empty (entropy 0, no gradient).
        want: names of the outputs to compute: the fields of ``PolicyStats`` but for ``num_fallback``.
        grad: names of the wanted outputs that carry a gradient: logprob, entropy, nucleus_entropy, nucleus_logprob,
            nucleus_mass, support_logprob, support_entropy.
        num_candidates: logits of a token that are sent to its owner rank; more resolve flatter distributions.
        support: the tokens of the vocabulary that a sampler kept for each of the T tokens, the same on every rank;
            needed by the support outputs. Where only those are wanted the logits are read at its ids alone, but for
            tokens with an empty row: their support is the whole vocabulary.
        inplace_backward: the backward writes the gradient over ``logits``, for a buffer nobody else reads; a second
            backward then raises.
        deterministic: every output and gradient has the same bits however the vocabulary is sharded, and whatever the
            number of threads (deterministic.py); on a CPU alone, and slower: every token's nucleus is searched.

    Raises:
        ValueError: shapes, dtypes, names or numbers that do not fit.
    """
    if logits.ndim == 2 and shard is None:
        shard = VocabShard.for_vocab(logits.shape[1])
    if logits.ndim != 2 or shard is None or logits.shape[1] != shard.width:
        expected = "[T, V]" if shard is None else f"[T, {shard.width}] for {shard}"
        raise ValueError(f"policy_stats: logits are {list(logits.shape)}, expected {expected}")
    options = checked_options(
        "policy_stats", T=len(logits), dtype=logits.dtype, shard=shard, targets=targets, temperature=temperature,
        top_p=top_p, min_p=min_p, nucleus=nucleus, want=want, grad=grad, num_candidates=num_candidates, support=support,
        deterministic=deterministic,
    )  # fmt: skip
    scale, support = inverse_temperature(temperature, len(logits), logits), support if options.over_support else None
    return PolicyStats(*_PolicyStatsFunction.apply(logits, targets, scale, support, options, inplace_backward))


class _PolicyStatsFunction(torch.autograd.Function):
    """T tokens, W = V/TP columns of this rank, K = num_candidates.

    tensor                shape        dtype             forward            backward
    logits                [T, W]       bf16, fp32, fp64  read once (1)      read once, written over if ``inplace``
    targets               [T]          int64             read               read
    scale                 [T, 1]       fp32 (2)          read               read
    support               [N], [T+1]   int64             read               read
    each wanted output    [T]          fp32 (2)          written            its upstream gradient is read
    gradient of logits    [T, W]       that of logits    -                  written once

    Saved: logits, targets and scale as they are (no copy), and the packed ``GlobalStats`` of stats.py, [T, 4] or with a
    nucleus [T, 8] in the dtype of scale: the gradient is e^d times a line in d for each part, so the two ends of that
    line are all that must be kept. The portable path also keeps where the nucleus is, [T, K] twice. Of a support, N ids
    of all tokens: it as it is, and [T, 4].

    Collectives over the shard's group, none of one rank: without a nucleus one all-gather; with one an all-to-all and
    an all-gather, and the gathers of the fallback where it is taken (a GPU always sends them); with one by min_p two
    all-gathers. With a support one
    all-gather more, and the others only where something of the whole vocabulary is wanted. With ``deterministic`` two
    without a nucleus, the search's gathers besides with one, and 8 B an id for a support. Backward: none.

    (1) again for tokens that take the fallback; on a GPU once more in the groups of columns that hold candidates, or
    with min_p the nucleus. Only at the support's ids where nothing of the whole vocabulary is wanted.
    (2) fp64 for fp64 logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        scale: Tensor,
        support: Support | None,
        options: Options,
        inplace: bool,
    ) -> tuple:
        found = support_stats.forward(logits, targets, scale, support, options)
        outputs = returned(found, options)
        ctx.options, ctx.inplace, ctx.has_support = options, inplace, support is not None
        ctx.save_for_backward(logits, targets, scale, *(support or ()), *found.saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*without_gradient(outputs, options))
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, scale, *saved = ctx.saved_tensors
        support, saved = (Support(*saved[:2]), saved[2:]) if ctx.has_support else (None, saved)
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        upstream_of = given(upstream, ctx.options)
        support_stats.backward(logits.detach(), targets, scale, tuple(saved), upstream_of, support, ctx.options, out)
        return out, None, None, None, None, None

"""The operators' work in torch (backend.py::Implementation): the CPU's path, and fp64's everywhere.

logit_passes.py reads and writes the logits, nucleus.py decides the nuclei and searches for those that the candidates do
not resolve, this file makes the outputs of what they found, and the backward's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.ops import deterministic, logit_passes, min_p
from megatron_ext.ops.candidates import Blocks, in_nucleus
from megatron_ext.ops.logit_passes import NucleusGradient, TokenGradient
from megatron_ext.ops.nucleus import exchange, exchange_candidates, search
from megatron_ext.ops.options import NUCLEUS, Forward, Options
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.stats import GlobalStats


def forward(logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Forward:
    """See backend.py::Implementation."""
    shard, rule = options.shard, options.rule
    if options.deterministic:
        stats = deterministic.global_stats(logits, _local_columns(targets, shard), scale, options)
        num_searched = len(logits) if rule and rule.min_p is None else 0
        searched = torch.tensor(num_searched, device=scale.device) if rule else None
        return Forward(_outputs(stats, scale, options), (_kept(stats, scale, options),), searched)
    sums, candidates = logit_passes.summarise(
        logits,
        _local_columns(targets, shard),
        scale,
        shard.real,
        moment=options.moment,
        num_candidates=_num_candidates(logits, options) if rule else None,
        tail=1.0 if rule and rule.min_p else 1 - options.held_share,  # by min_p only their blocks are asked for
    )
    if rule is None or candidates is None:
        stats, fallback, blocks = exchange(sums, scale, shard), None, None
    elif rule.min_p is not None:
        blocks, fallback = candidates.blocks, torch.tensor(0, device=scale.device)
        stats = min_p.exchange_nucleus(logits[:, : shard.real], sums, blocks, scale, shard, rule)
    else:
        stats, blocks = exchange_candidates(sums, candidates, scale, shard, rule), candidates.blocks
        assert stats.nucleus is not None
        unresolved = (stats.nucleus.size[:, 0] < 0).nonzero()[:, 0]
        if len(unresolved):  # every rank has the same
            stats = search(logits[:, : shard.real], unresolved, stats, scale, shard, rule)
        fallback = torch.tensor(len(unresolved), device=scale.device)
    saved = [_kept(stats, scale, options)]
    if options.nucleus_grad and blocks is not None:
        saved += blocks
    return Forward(_outputs(stats, scale, options), tuple(saved), fallback)


def backward(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    saved: tuple[Tensor, ...],
    upstream: Mapping[str, Tensor],
    options: Options,
    out: Tensor,
) -> None:
    """See backend.py::Implementation."""
    token = _token_gradient(saved, scale, upstream, options)
    passes = deterministic if options.deterministic else logit_passes
    passes.gradient(logits, _local_columns(targets, options.shard), scale, options.shard.real, token, out)


def _num_candidates(logits: Tensor, options: Options) -> int:
    """On every rank the same, and no more than there are logits; those of bf16 are counts of as many steps."""
    most = options.num_candidates
    return most if logits.dtype == torch.bfloat16 else min(most, options.shard.vocab_size)


def _kept(stats: GlobalStats, scale: Tensor, options: Options) -> Tensor:
    """What the backward needs of ``stats``, packed."""
    return (stats if options.nucleus_grad else stats._replace(nucleus=None)).pack(scale.dtype)


def _local_columns(targets: Tensor, shard: VocabShard) -> Tensor:
    """``[T, 1]``: the target's column in this shard, -1 where it has none."""
    column = targets[:, None] - shard.start
    return torch.where((column >= 0) & (column < shard.real), column, -1)


def _outputs(stats: GlobalStats, scale: Tensor, options: Options) -> dict[str, Tensor]:
    """The wanted outputs ``[T]`` by name."""
    at_target = (stats.target.double() - stats.maximum) * scale.double()
    values = {"logprob": at_target - stats.total.double().log(), "entropy": stats.entropy}
    if options.rule and stats.nucleus:
        nucleus = stats.nucleus
        hit = in_nucleus(stats.target, nucleus.theta, options.rule.keep_equal)
        values |= {
            "nucleus_entropy": nucleus.entropy,
            "nucleus_mass": nucleus.mass.double() / stats.total.double(),
            "nucleus_size": nucleus.size,
            "nucleus_logprob": torch.where(hit, at_target - nucleus.mass.double().log(), -torch.inf),
        }
    return {name: values[name][:, 0].to(scale.dtype, copy=True) for name in options.want}


def _token_gradient(
    saved: tuple[Tensor, ...], scale: Tensor, upstream: Mapping[str, Tensor], options: Options
) -> TokenGradient:
    """The backward's numbers from what ``forward`` saved and the upstream gradients."""
    g = {name: value[:, None].to(scale.dtype) for name, value in upstream.items()}
    packed, *blocks = saved
    stats = GlobalStats.unpack(packed)
    a = at_target = g.get("logprob", torch.zeros_like(stats.total))
    b = nucleus = None
    if "entropy" in g:
        a, b = a + g["entropy"] * (stats.entropy - stats.total.log()), -scale / stats.total * g["entropy"]
    if stats.nucleus and options.rule and any(name in g for name in NUCLEUS):
        theta, mass, entropy, size = stats.nucleus
        zero = torch.zeros_like(stats.total)
        some = size > 1  # an empty nucleus has no gradient, and that of a certain token vanishes
        mass = torch.where(some, mass, 1)
        weight = torch.where(some, -scale / mass, 0)
        g_entropy = g.get("nucleus_entropy", zero)
        hit = in_nucleus(stats.target, theta, options.rule.keep_equal)
        g_logprob = torch.where(hit & some, g.get("nucleus_logprob", zero), 0)
        a_n, b_n = weight * (g_logprob + g_entropy * (entropy - mass.log())), weight * g_entropy
        if "nucleus_mass" in g:  # of any nucleus: that of a certain token is not constant
            slope = g["nucleus_mass"] / stats.total
            a, a_n = a + slope * stats.nucleus.mass, a_n + scale * slope
        found_in = Blocks(*blocks) if blocks else None
        nucleus = NucleusGradient(a_n, b_n, theta, size, options.rule.keep_equal, found_in)
        at_target = at_target + g_logprob
    return TokenGradient(stats.maximum, -scale / stats.total * a, b, scale * at_target, nucleus)

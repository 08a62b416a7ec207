"""Log-probability and entropy of the policy renormalised on a support, and their gradient, beside the other outputs.

With S a token's support and d = (x - max over S) * scale, each rank sums over the ids of S that it holds; one
all-gather of the four numbers of ``ShardStats``, 16 B a token, makes the whole support's. With q = e^d / sum over S:

    support_logprob = log q[target], minus infinity for a target outside      support_entropy H = -sum q log q
    dL/dlogits_j = scale * [ g_lp (1[j=y] - q_j) - g_H q_j (log q_j + H) ]    for j in S, nothing elsewhere

Work is proportional to the ids, in fp64: gathers and sums over segments in torch, on a GPU too. The logits are read as
a whole only for what else is wanted, and for tokens whose row is empty: their support is the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.backend import implementation
from megatron_ext.ops.collectives import all_gather
from megatron_ext.ops.nucleus import merge
from megatron_ext.ops.options import SUPPORT, Forward, Options
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.stats import GlobalStats
from megatron_ext.ops.support import Support

ON_WHOLE = {"support_logprob": "logprob", "support_entropy": "entropy"}  # the output that it is for an empty row


class _Entries(NamedTuple):
    """The ids of a support, ``[N]`` each."""

    token: Tensor
    column: Tensor  # in this shard; 0 where another rank holds the id
    held: Tensor  # whether this rank holds it
    is_target: Tensor
    logit: Tensor  # fp64; minus infinity where another rank holds the id


def forward(logits: Tensor, targets: Tensor, scale: Tensor, support: Support | None, options: Options) -> Forward:
    """:meth:`Implementation.forward` (backend.py), with the outputs over ``support`` among those wanted.

    Saved after what the implementation saves: the support's packed ``GlobalStats`` ``[T, 4]``.
    """
    work = implementation(logits)
    if support is None:
        return work.forward(logits, targets, scale, options)
    unrestricted = support.unrestricted_tokens()
    whole, at = _whole_options(options, len(unrestricted) > 0), slice(None) if options.whole else unrestricted
    found = work.forward(logits[at], targets[at], scale[at], whole) if whole.want else Forward({}, (), None)
    stats = _support_stats(_entries(logits, targets, support, options.shard), scale, support, options)
    values = {
        "support_logprob": (stats.target - stats.maximum) * scale.double() - stats.total.log(),
        "support_entropy": stats.entropy,
    }
    outputs = {name: found.outputs[name] for name in options.whole}
    numbers = stats.pack(scale.dtype)
    for name in options.over_support:
        outputs[name] = values[name][:, 0].to(scale.dtype, copy=True)
        if len(unrestricted):
            of_whole = found.outputs[ON_WHOLE[name]]
            outputs[name][unrestricted] = of_whole[unrestricted] if options.whole else of_whole
    if options.whole:
        return Forward(outputs, (*found.saved, numbers), found.fallback)
    if len(unrestricted):
        (numbers[unrestricted],) = found.saved
    return Forward(outputs, (numbers,), None)


def backward(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    saved: tuple[Tensor, ...],
    upstream: Mapping[str, Tensor],
    support: Support | None,
    options: Options,
    out: Tensor,
) -> None:
    """:meth:`Implementation.backward` (backend.py), with the outputs over ``support``."""
    work = implementation(logits)
    if support is None:
        return work.backward(logits, targets, scale, saved, upstream, options, out)
    unrestricted, numbers = support.unrestricted_tokens(), saved[-1]
    of_whole = _upstream_of_whole(upstream, support, len(unrestricted) > 0)
    whole = _whole_options(options, len(unrestricted) > 0)
    entries = _entries(logits, targets, support, options.shard)
    value = _gradient(entries, GlobalStats.unpack(numbers), scale, upstream)  # before ``out`` is written over
    if not of_whole:
        out.zero_()
    elif options.whole:
        work.backward(logits, targets, scale, saved[:-1], of_whole, whole, out)
    else:
        part, own = logits[unrestricted], {name: g[unrestricted] for name, g in of_whole.items()}
        work.backward(part, targets[unrestricted], scale[unrestricted], (numbers[unrestricted],), own, whole, part)
        out.zero_()
        out[unrestricted] = part
    out.index_put_((entries.token, entries.column), value.to(out.dtype), accumulate=True)  # unique, but for added zeros


def _whole_options(options: Options, any_unrestricted: bool) -> Options:
    """The options of the pass over the whole vocabulary: what is wanted of it, and what stands in for empty rows."""
    more = [ON_WHOLE[name] for name in options.over_support] if any_unrestricted else []
    return options._replace(want=tuple(dict.fromkeys([*options.whole, *more])))


def _upstream_of_whole(upstream: Mapping[str, Tensor], support: Support, any_unrestricted: bool) -> dict[str, Tensor]:
    """The upstream gradients of the pass over the whole vocabulary, with those of empty rows."""
    found = {name: g for name, g in upstream.items() if name not in SUPPORT}
    for name, g in upstream.items() if any_unrestricted else ():
        if name in SUPPORT:
            own = torch.where(support.sizes == 0, g, 0)
            found[ON_WHOLE[name]] = found[ON_WHOLE[name]] + own if ON_WHOLE[name] in found else own
    return found


def _entries(logits: Tensor, targets: Tensor, support: Support, shard: VocabShard) -> _Entries:
    token, (column, held) = support.token_of_id(), support.columns(shard)
    logit = torch.where(held, logits[token, column].double(), -torch.inf)
    return _Entries(token, column, held, support.ids == targets[token], logit)


def _support_stats(entries: _Entries, scale: Tensor, support: Support, options: Options) -> GlobalStats:
    """``[T, 1]`` each, fp64; meaningless for empty rows. If deterministic, every rank sums over all ids by itself."""
    group = options.shard.group
    if options.deterministic:
        entries, group = entries._replace(logit=all_gather(entries.logit, group).amax(0)), None
    at_target = torch.where(entries.is_target, entries.logit, -torch.inf)
    maximum, target = _over_tokens("max", support, entries.logit, at_target)
    finite = torch.where(maximum > -torch.inf, maximum, torch.where(maximum.isnan(), maximum, 0))
    d = ((entries.logit - finite[entries.token]) * scale[entries.token, 0].double()).clamp_min(-1e30)
    total, moment = _over_tokens("sum", support, d.exp(), d.exp() * d)
    sums = torch.stack([maximum, total, moment, target], 1).to(scale.dtype)
    return merge(all_gather(sums, group), scale)


def _over_tokens(reduce: str, support: Support, *values: Tensor) -> tuple[Tensor, ...]:
    """``[N] -> [T]`` for each of ``values``, in the order of the ids: the same bits in every run."""
    initial = -torch.inf if reduce == "max" else 0.0
    return torch.segment_reduce(torch.stack(values, 1), reduce, offsets=support.starts, axis=0, initial=initial).unbind(
        1
    )


def _gradient(entries: _Entries, stats: GlobalStats, scale: Tensor, upstream: Mapping[str, Tensor]) -> Tensor:
    """``[N]`` fp64: the gradient at every id that this rank holds, 0 at the others."""
    packed, scale = stats.pack(torch.float64)[entries.token], scale[entries.token].double()
    maximum, total, entropy, target = packed.unbind(1)
    log_q = ((entries.logit - maximum) * scale[:, 0] - total.log()).clamp_min(-1e30)
    q, value = log_q.exp(), torch.zeros_like(entries.logit)
    if "support_logprob" in upstream:
        inside = torch.where(target > -torch.inf, upstream["support_logprob"][entries.token].double(), 0)
        value += inside * (entries.is_target.double() - q)
    if "support_entropy" in upstream:
        value -= upstream["support_entropy"][entries.token].double() * q * (log_q + entropy)
    return torch.where(entries.held, value * scale[:, 0], 0)

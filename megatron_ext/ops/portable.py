"""The operators' work in torch (backend.py::Implementation): the CPU's path, and fp64's everywhere.

logit_passes.py does the row work, nucleus.py decides the rows and searches those whose windows do not, this file makes
the outputs and the backward's row numbers of what they found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.ops import logit_passes
from megatron_ext.ops.candidates import Blocks, in_nucleus
from megatron_ext.ops.logit_passes import TokenGradient
from megatron_ext.ops.nucleus import GlobalStats, exchange, exchange_candidates, search
from megatron_ext.ops.options import Forward, Options
from megatron_ext.ops.shard import VocabShard


def forward(logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Forward:
    """See backend.py::Implementation."""
    shard, rule = options.shard, options.rule
    column, num_candidates = _local_columns(targets, shard), options.num_candidates if rule else None
    sums, found = logit_passes.summarise(
        logits,
        column,
        scale,
        shard.real,
        moment=options.moment,
        num_candidates=num_candidates,
        tail=1 - options.held_share,
    )
    if rule is None or found is None:
        decided, fallback, blocks = exchange(sums, scale, shard), None, None
    else:
        decided, blocks = exchange_candidates(sums, found, scale, shard, rule), found.blocks
        assert decided.size is not None
        unresolved = (decided.size[:, 0] < 0).nonzero()[:, 0]
        if len(unresolved):  # every rank has the same
            decided = search(logits[:, : shard.real], unresolved, decided, scale, shard, rule)
        fallback = torch.tensor(len(unresolved), device=scale.device)
    saved = [_saved(decided, options, scale.dtype)]
    if options.nucleus_grad and blocks is not None:
        saved += blocks
    return Forward(_outputs(decided, scale, options), tuple(saved), fallback)


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
    row = _token_gradient(saved, scale, upstream, options)
    logit_passes.gradient(logits, _local_columns(targets, options.shard), scale, options.shard.real, row, out)


def _local_columns(targets: Tensor, shard: VocabShard) -> Tensor:
    """``[rows, 1]``: the target's column in this shard, -1 where it has none."""
    column = targets[:, None] - shard.start
    return torch.where((column >= 0) & (column < shard.real), column, -1)


def _outputs(found: GlobalStats, scale: Tensor, options: Options) -> dict[str, Tensor]:
    log_total = found.total.double().log()
    at_target = (found.target.double() - found.maximum) * scale.double()
    values = {"logprob": at_target - log_total, "entropy": found.entropy}
    if options.rule:
        assert found.theta is not None and found.mass is not None
        assert found.nucleus_entropy is not None and found.size is not None
        hit = in_nucleus(found.target, found.theta, options.rule.keep_equal)
        values |= {
            "nucleus_entropy": found.nucleus_entropy,
            "nucleus_mass": found.mass.double() / found.total.double(),
            "nucleus_size": found.size,
            "nucleus_logprob": torch.where(hit, at_target - found.mass.double().log(), -torch.inf),
            "target_in_nucleus": hit,
        }
    wanted = {name: values[name][:, 0] for name in options.want}
    return {n: v.clone() if v.dtype == torch.bool else v.to(scale.dtype, copy=True) for n, v in wanted.items()}


def _saved(found: GlobalStats, options: Options, dtype: torch.dtype) -> Tensor:
    """``[T, 4 or 8]``: the numbers of ``GlobalStats`` that the backward needs."""
    columns = [found.maximum, found.total, found.entropy, found.target]
    if options.nucleus_grad:
        assert found.theta is not None and found.mass is not None
        assert found.nucleus_entropy is not None and found.size is not None
        columns += [found.theta, found.mass, found.nucleus_entropy, found.size]
    return torch.cat([column.to(dtype) for column in columns], 1)


def _token_gradient(
    saved: tuple[Tensor, ...], scale: Tensor, upstream: Mapping[str, Tensor], options: Options
) -> TokenGradient:
    """The backward's row numbers from what ``forward`` saved and the upstream gradients."""
    g = {name: value[:, None].to(scale.dtype) for name, value in upstream.items()}
    numbers, *places = saved
    maximum, total, entropy, target, *nucleus = numbers.split(1, dim=1)
    a = at_target = g.get("logprob", torch.zeros_like(total))
    b = through_nucleus = theta = size = None
    keep_equal = options.rule is not None and options.rule.keep_equal
    if "entropy" in g:
        a, b = a + g["entropy"] * (entropy - total.log()), -scale / total * g["entropy"]
    if nucleus and ("nucleus_entropy" in g or "nucleus_logprob" in g):
        theta, mass, nucleus_entropy, size = nucleus
        zero = torch.zeros_like(total)
        some = size > 1  # an empty nucleus has no gradient, and that of a certain token vanishes
        weight = torch.where(some, -scale / torch.where(some, mass, 1), 0)
        g_entropy = g.get("nucleus_entropy", zero)
        hit = in_nucleus(target, theta, keep_equal)
        g_logprob = torch.where(hit & some, g.get("nucleus_logprob", zero), 0)
        log_mass = torch.where(some, mass, 1).log()
        through_nucleus = (weight * (g_logprob + g_entropy * (nucleus_entropy - log_mass)), weight * g_entropy)
        at_target = at_target + g_logprob
    blocks = Blocks(*places) if places else None
    a, at_target = -scale / total * a, scale * at_target
    return TokenGradient(maximum, a, b, at_target, through_nucleus, theta, keep_equal, size, blocks)

"""What the operators of this package return, and what they share: checks, row outputs, the backward's row numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.collectives import all_gather, group_size
from megatron_ext.ops.nucleus import BLOCK, Rows, Rule, exchange, exchange_windows, search
from megatron_ext.ops.rows import RowGradient
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.window import Blocks, Window, in_nucleus

NUCLEUS = ("nucleus_entropy", "nucleus_mass", "nucleus_size", "nucleus_logprob", "target_in_nucleus")
DIFFERENTIABLE = ("logprob", "entropy", "nucleus_entropy", "nucleus_logprob")
WINDOW = 256  # highest logits of a row that a rank sends; twice as many keys of bf16 logits, in as many bytes


@dataclass(frozen=True)
class PolicyStats:
    """Row statistics ``[rows]``, fp32 (fp64 for fp64 logits), in nats; None where not wanted.

    ``nucleus_logprob`` is minus infinity for a target outside the nucleus (see ``target_in_nucleus``, bool).
    ``slow_rows`` counts the rows whose threshold took the pivot search; int64 scalar, None without a nucleus.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    nucleus_mass: Tensor | None = None
    nucleus_size: Tensor | None = None
    nucleus_logprob: Tensor | None = None
    target_in_nucleus: Tensor | None = None
    slow_rows: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise KeyError(f"PolicyStats: {name} was not computed; name it in want")
        return value


OUTPUTS = tuple(field.name for field in fields(PolicyStats))


class Options(NamedTuple):
    """The arguments of one call that are not tensors."""

    shard: VocabShard
    rule: Rule | None  # None: no nucleus output is wanted
    want: tuple[str, ...]
    grad: tuple[str, ...]
    window: int

    @property
    def summary(self) -> dict[str, Any]:
        """What the row work must compute: nothing that nobody asked for."""
        # what lies below the crossing holds about 1 - top_p of the whole mass: half of it is spread over the ranks
        tail = (1 - self.rule.top_p) / (2 * group_size(self.shard.group)) if self.rule else 0.0
        return {"moment": "entropy" in self.want, "window": self.window if self.rule else None, "tail": tail}


def row_scale(temperature: float | Tensor, rows: int, like: Tensor) -> Tensor:
    """1 / temperature ``[rows, 1]`` in the dtype of the arithmetic: fp32, or fp64 for fp64 logits."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(temperature, device=like.device).detach().double().reciprocal().to(dtype)
    return scale.expand(rows)[:, None]


def local_columns(targets: Tensor, shard: VocabShard) -> Tensor:
    """``[rows, 1]``: the target's column in this shard, -1 where it has none."""
    column = targets[:, None] - shard.start
    return torch.where((column >= 0) & (column < shard.real), column, -1)


def finish(
    ctx: Any,
    sums: Tensor,
    window: Window | None,
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor,
    scale: Tensor,
    options: Options,
) -> tuple[tuple[Tensor | None, ...], Tensor | None, list[Tensor]]:
    """From the row work to the outputs of a forward, the tie cut, and what its backward needs of every row.

    ``logits_of(index)`` gives a copy of the raw logits ``[len(index), shard.real]`` of any rows.
    """
    slow = cut = None
    if options.rule is None or window is None:
        rows = exchange(sums, scale, options.shard)
    else:
        rows = exchange_windows(sums, window, scale, options.shard, options.rule)
        rows, slow = search_uncertified(rows, logits_of, scale, options)
        cut = cut_ids(rows, logits_of, options.shard) if options.rule.ties == "by_id" else None
    outputs = row_outputs(rows, targets, scale, cut, slow, options)
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[o for name, o in outputs.items() if o is not None and name not in options.grad])
    blocks = window.blocks if window is not None and any(name in NUCLEUS for name in options.grad) else None
    return tuple(outputs.values()), cut, [saved_rows(rows, targets, cut, options, scale.dtype), *(blocks or ())]


def search_uncertified(
    rows: Rows, logits_of: Callable[[Tensor], Tensor], scale: Tensor, options: Options
) -> tuple[Rows, Tensor]:
    """Decide the rows that the windows left open. Every rank sees the same rows, so all enter or none."""
    assert rows.size is not None and options.rule is not None
    slow = (rows.size[:, 0] < 0).nonzero()[:, 0]
    if len(slow):
        rows = search(logits_of, slow, rows, scale, options.shard, options.rule)
    return rows, slow


def cut_ids(rows: Rows, logits_of: Callable[[Tensor], Tensor], shard: VocabShard) -> Tensor:
    """``[T, 1]`` int64: the last token id equal to theta that belongs to the nucleus, -1 for none. One all-gather."""
    assert rows.theta is not None and rows.cut_rank is not None and rows.cut_count is not None
    last = torch.full_like(rows.cut_rank, -1, dtype=torch.int64)
    for index in torch.arange(len(last), device=last.device).split(max(1, BLOCK // shard.width)):
        equal = logits_of(index).to(rows.theta.dtype) == rows.theta[index]
        if shard.real:
            found = equal & (equal.cumsum(1) == rows.cut_count[index])
            last[index] = torch.where(found.any(-1), found.byte().argmax(-1) + shard.start, -1)[:, None]
    return all_gather(last, shard.group).gather(0, rows.cut_rank[None].long())[0]


def row_outputs(
    rows: Rows, targets: Tensor, scale: Tensor, cut: Tensor | None, slow: Tensor | None, options: Options
) -> dict[str, Tensor | None]:
    """The outputs by name, in the order of :class:`PolicyStats`."""
    log_total = rows.total.double().log()
    at_target = (rows.target.double() - rows.maximum) * scale.double()
    values = {"logprob": at_target - log_total, "entropy": rows.entropy}
    if options.rule and slow is not None:
        assert rows.theta is not None and rows.mass is not None
        assert rows.nucleus_entropy is not None and rows.size is not None
        hit = in_nucleus(rows.target, rows.theta, options.rule.keep_equal, targets[:, None], cut)
        values |= {
            "nucleus_entropy": rows.nucleus_entropy,
            "nucleus_mass": rows.mass.double() / rows.total.double(),
            "nucleus_size": rows.size,
            "nucleus_logprob": torch.where(hit, at_target - rows.mass.double().log(), -torch.inf),
            "target_in_nucleus": hit,
        }
    outputs: dict[str, Tensor | None] = dict.fromkeys(OUTPUTS)
    for name in options.want:
        value = values[name][:, 0]
        outputs[name] = value.clone() if value.dtype == torch.bool else value.to(scale.dtype, copy=True)
    outputs["slow_rows"] = None if slow is None else torch.tensor(len(slow), device=scale.device)
    return outputs


def saved_rows(rows: Rows, targets: Tensor, cut: Tensor | None, options: Options, dtype: torch.dtype) -> Tensor:
    """``[T, 3 or 8]``: the numbers :func:`row_gradient` needs."""
    columns = [rows.maximum, rows.total, rows.entropy]
    if options.rule and any(name in NUCLEUS for name in options.grad):
        assert rows.theta is not None and rows.mass is not None
        assert rows.nucleus_entropy is not None and rows.size is not None
        hit = in_nucleus(rows.target, rows.theta, options.rule.keep_equal, targets[:, None], cut)
        columns += [rows.theta, rows.mass, rows.nucleus_entropy, rows.size, hit]
    return torch.cat([column.to(dtype) for column in columns], 1)


def row_gradient(
    saved: Sequence[Tensor], scale: Tensor, cut: Tensor | None, upstream: Sequence[Tensor | None], options: Options
) -> RowGradient:
    """The backward's row numbers from what ``finish`` left and the upstream gradients, in the order of PolicyStats."""
    g = {
        name: value[:, None].to(scale.dtype)
        for name, value in zip(OUTPUTS, upstream, strict=True)
        if value is not None and name in options.grad
    }
    numbers, *places = saved
    maximum, total, entropy, *nucleus = numbers.split(1, dim=1)
    a = at_target = g.get("logprob", torch.zeros_like(total))
    b = through_nucleus = theta = size = None
    if "entropy" in g:
        a, b = a + g["entropy"] * (entropy - total.log()), -scale / total * g["entropy"]
    if nucleus and ("nucleus_entropy" in g or "nucleus_logprob" in g):
        theta, mass, nucleus_entropy, size, hit = nucleus
        zero = torch.zeros_like(total)
        some = size > 1  # an empty nucleus has no gradient, and that of a certain token vanishes
        weight = torch.where(some, -scale / torch.where(some, mass, 1), 0)
        g_entropy = g.get("nucleus_entropy", zero)
        g_logprob = torch.where((hit > 0) & some, g.get("nucleus_logprob", zero), 0)
        log_mass = torch.where(some, mass, 1).log()
        through_nucleus = (weight * (g_logprob + g_entropy * (nucleus_entropy - log_mass)), weight * g_entropy)
        at_target = at_target + g_logprob
    local_cut = None if cut is None else cut - options.shard.start
    keep_equal = options.rule is not None and options.rule.keep_equal
    blocks = Blocks(*places) if places else None
    a, at_target = -scale / total * a, scale * at_target
    return RowGradient(maximum, a, b, at_target, through_nucleus, theta, keep_equal, local_cut, size, blocks)


def check(
    rows: int,
    dtype: torch.dtype,
    targets: Tensor,
    temperature: float | Tensor,
    options: Options,
    top_p: float | None,
    nucleus: str,
    ties: str,
) -> None:
    """Raise ValueError for arguments that do not fit together."""
    known = [name for name in OUTPUTS if name != "slow_rows"]
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"policy_stats: logits are {dtype}, expected bfloat16, float32 or float64")
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(
            f"policy statistics: targets are {targets.dtype} {list(targets.shape)}, expected int64 [{rows}]"
        )
    if isinstance(temperature, Tensor) and temperature.shape not in ((), (rows,)):
        raise ValueError(f"policy_stats: temperature is {list(temperature.shape)}, expected a number or [{rows}]")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"policy_stats: temperature is {temperature}, expected more than 0")
    if unknown := [name for name in options.want if name not in known]:
        raise ValueError(f"policy_stats: want has unknown outputs {unknown}; known are {known}")
    if wrong := [name for name in options.grad if name not in options.want or name not in DIFFERENTIABLE]:
        raise ValueError(f"policy_stats: grad names {wrong}; expected wanted outputs among {list(DIFFERENTIABLE)}")
    if any(name in NUCLEUS for name in options.want) and (top_p is None or not 0 < top_p <= 1):
        raise ValueError(f"policy_stats: nucleus outputs need top_p in (0, 1], found {top_p}")
    if nucleus not in ("reach", "below"):
        raise ValueError(f"policy_stats: nucleus is {nucleus!r}, expected 'reach' or 'below'")
    if ties not in ("all", "by_id"):
        raise ValueError(f"policy_stats: ties is {ties!r}, expected 'all' or 'by_id'")
    if options.window < 1:
        raise ValueError(f"policy_stats: window is {options.window}, expected at least 1")

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
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.collectives import all_gather
from megatron_ext.ops.shard import VocabShard

NUCLEUS = ("nucleus_entropy", "nucleus_mass", "nucleus_size", "nucleus_logprob", "target_in_nucleus")
DIFFERENTIABLE = ("logprob", "entropy", "nucleus_entropy", "nucleus_logprob")
PIVOTS = 15  # of one search round: four bits of the threshold's key


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


def policy_stats(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | None = None,
    nucleus: str = "reach",
    want: Sequence[str] = ("logprob", "entropy"),
    grad: Sequence[str] = ("logprob",),
) -> PolicyStats:
    """Statistics of the policy softmax(logits / temperature) at every row, exact over the whole vocabulary.

    Args:
        logits: ``[rows, shard.width]`` bf16, fp32 or fp64, raw (before temperature). Never written to.
        targets: ``[rows]`` int64, global token ids, the same on every rank of the group.
        shard: the columns this rank holds.
        temperature: a positive number, or ``[rows]``.
        top_p: the nucleus' mass, in (0, 1]; needed by the nucleus outputs, which are exact, ties included
            (a tied group is kept or dropped as one).
        nucleus: ``reach`` keeps the token at which the mass reaches top_p, ``below`` does not and may be empty
            (entropy 0, no gradient).
        want: names of the outputs to compute.
        grad: names of the wanted outputs that carry a gradient: logprob, entropy, nucleus_entropy, nucleus_logprob.

    Raises:
        ValueError: shapes, dtypes, names or numbers that do not fit.
    """
    _check(logits, targets, shard, top_p, nucleus, want, grad)
    options = _Options(shard, top_p, nucleus, tuple(want), tuple(grad))
    scale = torch.as_tensor(temperature, device=logits.device).detach().to(_accumulator(logits.dtype)).reciprocal()
    outputs = _PolicyStatsFunction.apply(logits, targets, scale.expand(len(logits))[:, None], options)
    present = {name: value for name, value in zip(_OUTPUTS, outputs, strict=True) if value is not None}
    return PolicyStats(**present)


_OUTPUTS = tuple(field.name for field in fields(PolicyStats))


class _Options(NamedTuple):
    shard: VocabShard
    top_p: float | None
    nucleus: str
    want: tuple[str, ...]
    grad: tuple[str, ...]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _PolicyStatsFunction(torch.autograd.Function):
    """Saves the logits, which the caller keeps anyway, and seven numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: Tensor, options: _Options) -> tuple:
        shard = options.shard
        x = logits[:, : shard.real].to(scale.dtype)  # raw logits of the real columns, [T, real]
        local = targets[:, None] - shard.start
        mine = (local >= 0) & (local < shard.real)
        minus_inf = torch.full_like(scale, -torch.inf)
        target = torch.where(mine, x.gather(-1, torch.where(mine, local, 0)), minus_inf) if shard.real else minus_inf
        maximum = _gathered(x.amax(-1, keepdim=True) if shard.real else minus_inf, shard).amax(0)
        target = _gathered(target, shard).amax(0)
        d = ((x - maximum) * scale).clamp_min(-1e30)  # finite, so that 0 * d is 0
        e = d.exp()
        total, moment = _summed(torch.stack([e.sum(-1), (e * d).sum(-1)], -1), shard).split(1, dim=-1)
        log_total = total.log()
        values: dict[str, Tensor] = {
            "logprob": (target - maximum) * scale - log_total,
            "entropy": log_total - moment / total,
        }
        theta = None
        if any(name in NUCLEUS for name in options.want):
            theta = _crossing(x, e, total, options)
            inside = _inside(x, theta, options.nucleus)
            part = torch.where(inside, e, 0)
            sums = torch.stack([part.sum(-1), (part * d).sum(-1), inside.sum(-1).to(e.dtype)], -1)
            mass, part_moment, size = _summed(sums, shard).split(1, dim=-1)
            some = size > 0
            log_mass = torch.where(some, mass, 1).log()
            hit = _inside(target, theta, options.nucleus)
            outside = torch.full_like(target, -torch.inf)
            values |= {
                "nucleus_entropy": torch.where(some, log_mass - part_moment / torch.where(some, mass, 1), 0),
                "nucleus_mass": mass / total,
                "nucleus_size": size,
                "nucleus_logprob": torch.where(hit, (target - maximum) * scale - log_mass, outside),
                "target_in_nucleus": hit,
                "slow_rows": torch.full((1, 1), len(x), device=x.device),
            }
            values["log_mass"] = log_mass
        outputs = [values[name][:, 0] if name in options.want else None for name in _OUTPUTS[:-1]]
        outputs.append(values["slow_rows"][0, 0] if theta is not None else None)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.mark_non_differentiable(
            *[o for name, o in zip(_OUTPUTS, outputs, strict=True) if o is not None and name not in options.grad]
        )
        rows = [maximum, scale, log_total, values["entropy"]]
        if theta is not None:
            rows += [theta, values["log_mass"], values["nucleus_entropy"], values["target_in_nucleus"]]
        ctx.save_for_backward(logits, local, *rows)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, local, maximum, scale, log_total, entropy, *nucleus = ctx.saved_tensors
        options: _Options = ctx.options
        real = options.shard.real
        g = {
            name: torch.zeros_like(scale) if value is None or name not in options.grad else value[:, None]
            for name, value in zip(_OUTPUTS, upstream, strict=True)
        }
        x = logits[:, :real].to(scale.dtype)
        logp = ((x - maximum) * scale).clamp_min(-1e30) - log_total
        p = logp.exp()
        result = torch.zeros_like(logits)
        dx = -p * (g["logprob"] + g["entropy"] * (logp + entropy))
        at_target = g["logprob"]
        if nucleus:
            theta, log_mass, nucleus_entropy, hit = nucleus
            logq = logp + log_total - log_mass
            g_nlp = torch.where(hit, g["nucleus_logprob"], 0)
            dq = -logq.exp() * (g_nlp + g["nucleus_entropy"] * (logq + nucleus_entropy))
            dx += torch.where(_inside(x, theta, options.nucleus), dq, 0)
            at_target = at_target + g_nlp
        mine = (local >= 0) & (local < real)
        if real:
            dx.scatter_add_(-1, torch.where(mine, local, 0), torch.where(mine, at_target, 0))
        result[:, :real] = dx * scale
        return result, None, None, None


def _gathered(value: Tensor, shard: VocabShard) -> Tensor:
    return all_gather(value, shard.group)


def _summed(value: Tensor, shard: VocabShard) -> Tensor:
    return _gathered(value, shard).sum(0)


def _inside(x: Tensor, theta: Tensor, nucleus: str) -> Tensor:
    return (x >= theta if nucleus == "reach" else x > theta) & (x > -torch.inf)


def _order_key(x: Tensor) -> Tensor:
    """int64 keys in the order of the floats, 0.0 and -0.0 alike."""
    bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits).long()


def _from_order_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    lowest = torch.iinfo(integer).min
    return torch.where(key < 0, lowest - key, key).to(integer).view(dtype)


def _crossing(x: Tensor, e: Tensor, total: Tensor, options: _Options) -> Tensor:
    """The highest logit ``[T, 1]`` whose tokens and all higher ones hold ``top_p`` of the mass: a search over keys.

    Each round weighs the tokens at or above ``PIVOTS`` keys between ``low`` (reached) and ``high`` (not reached).
    """
    assert options.top_p is not None
    limit = float("inf") if options.top_p >= 1 else options.top_p
    dtype, key = x.dtype, _order_key(x)
    finite = torch.where(x > -torch.inf, x, torch.inf)
    edge = torch.full_like(total, torch.inf)
    lowest = _gathered(finite.amin(-1, keepdim=True) if options.shard.real else edge, options.shard).amin(0)
    low, high = _order_key(lowest), torch.full_like(total, torch.inf, dtype=dtype)
    high = _order_key(high)
    for _ in range(16 if dtype == torch.float64 else 8):
        step = (high >> 4) - (low >> 4) + ((high & 15) - (low & 15) + 15 >> 4)  # (high - low) / 16 rounded up
        pivots = torch.cat([low + step * i for i in range(1, PIVOTS + 1)], -1)
        above = torch.stack([torch.where(key >= pivots[:, i : i + 1], e, 0).sum(-1) for i in range(PIVOTS)], -1)
        reached = (_summed(above, options.shard) >= limit * total).sum(-1, keepdim=True)
        low, high = low + step * reached, torch.where(reached < PIVOTS, low + step * (reached + 1), high)
    return _from_order_key(low, dtype)


def _check(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    top_p: float | None,
    nucleus: str,
    want: Sequence[str],
    grad: Sequence[str],
) -> None:
    if logits.ndim != 2 or logits.shape[1] != shard.width:
        raise ValueError(f"policy_stats: logits are {list(logits.shape)}, expected [rows, {shard.width}] for {shard}")
    if logits.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"policy_stats: logits are {logits.dtype}, expected bfloat16, float32 or float64")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"policy_stats: targets are {targets.dtype} {list(targets.shape)}, expected int64 [{len(logits)}]"
        )
    known = [name for name in _OUTPUTS if name != "slow_rows"]
    if unknown := [name for name in want if name not in known]:
        raise ValueError(f"policy_stats: want has unknown outputs {unknown}; known are {known}")
    if wrong := [name for name in grad if name not in want or name not in DIFFERENTIABLE]:
        raise ValueError(f"policy_stats: grad names {wrong}; expected wanted outputs among {list(DIFFERENTIABLE)}")
    if any(name in NUCLEUS for name in want) and (top_p is None or not 0 < top_p <= 1):
        raise ValueError(f"policy_stats: nucleus outputs need top_p in (0, 1], found {top_p}")
    if nucleus not in ("reach", "below"):
        raise ValueError(f"policy_stats: nucleus is {nucleus!r}, expected 'reach' or 'below'")

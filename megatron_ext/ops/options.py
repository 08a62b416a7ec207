"""What the operators of this package take and return, whoever does the work: options, outputs, checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.collectives import group_size
from megatron_ext.ops.shard import VocabShard
from megatron_ext.ops.support import Support

NUCLEUS = ("nucleus_entropy", "nucleus_mass", "nucleus_size", "nucleus_logprob")
SUPPORT = ("support_logprob", "support_entropy")  # over the caller's support
DIFFERENTIABLE = ("logprob", "entropy", "nucleus_entropy", "nucleus_logprob", "nucleus_mass")  # and those of SUPPORT
NUM_CANDIDATES = (
    256  # highest logits of a token that a rank sends; of bf16 logits twice as many counts, in as many bytes
)


@dataclass(frozen=True)
class PolicyStats:
    """Statistics of every token, ``[T]`` fp32 (fp64 for fp64 logits), in nats; None where not wanted.

    ``nucleus_logprob`` is the log-probability renormalised inside the nucleus, minus infinity for a target outside:
    for rollouts that were sampled with top-p by the same logits. With ``min_p`` the nucleus is the tokens of the
    vocabulary that are likely enough beside the likeliest one.
    ``support_logprob`` and ``support_entropy`` are those of the policy renormalised on the caller's support, the tokens
    that a sampler kept (support.py): what the replay of a rollout needs. Minus infinity for a target outside.
    ``num_fallback`` counts the tokens that the candidates left unresolved; int64 scalar on the device of the logits,
    None without a nucleus.

    Not ``types.TokenStats``: there every field is ``[T]`` and the log-probability always present, so that methods and
    the trainer can cut and join them by token. This package imports no other, and what is below it imports no operator.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    nucleus_mass: Tensor | None = None
    nucleus_size: Tensor | None = None
    nucleus_logprob: Tensor | None = None
    support_logprob: Tensor | None = None
    support_entropy: Tensor | None = None
    num_fallback: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise KeyError(f"PolicyStats: {name} was not computed; name it in want")
        return value


OUTPUTS = tuple(field.name for field in fields(PolicyStats))


@dataclass(frozen=True)
class NucleusRule:
    """Where the nucleus ends. ``limit`` is infinite for top_p 1: the cutoff token then has the lowest finite logit.

    With ``min_p`` it ends at a probability, not at a mass (min_p.py), and ``top_p`` means nothing.
    """

    top_p: float
    nucleus: str  # inclusive | exclusive
    min_p: float | None = None

    @property
    def limit(self) -> float:
        return self.top_p if self.top_p < 1 else float("inf")

    @property
    def keep_equal(self) -> bool:
        return self.nucleus == "inclusive"


class Options(NamedTuple):
    """The arguments of one call that are not tensors."""

    shard: VocabShard
    rule: NucleusRule | None  # None: no nucleus output is wanted
    want: tuple[str, ...]
    grad: tuple[str, ...]
    num_candidates: int
    deterministic: bool = False

    @property
    def whole(self) -> tuple[str, ...]:
        """What is wanted that needs a pass over the logits."""
        return tuple(name for name in self.want if name not in SUPPORT)

    @property
    def over_support(self) -> tuple[str, ...]:
        """What is wanted of the caller's support."""
        return tuple(name for name in self.want if name in SUPPORT)

    @property
    def moment(self) -> bool:
        """Whether sum d e^d is asked for."""
        return "entropy" in self.want

    @property
    def held_share(self) -> float:
        """The share of a shard's mass that its candidates should hold.

        What lies below the cutoff token holds about 1 - top_p of the whole mass: half of it is spread over the ranks.
        """
        if self.rule is None or self.rule.min_p is not None:
            return 1.0
        return 1 - (1 - self.rule.top_p) / (2 * group_size(self.shard.group))

    @property
    def nucleus_grad(self) -> bool:
        return any(name in NUCLEUS for name in self.grad)


class Forward(NamedTuple):
    """What the work of a forward leaves, each tensor with a first axis of tokens."""

    outputs: dict[str, Tensor]  # by name, at least those wanted
    saved: tuple[Tensor, ...]  # what the backward needs besides logits, targets and scale
    fallback: Tensor | None  # int64 scalar: tokens that took the fallback; None without a nucleus


def join(parts: Sequence[Forward]) -> Forward:
    """The forwards of consecutive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    outputs = {name: torch.cat([part.outputs[name] for part in parts]) for name in parts[0].outputs}
    saved = tuple(torch.cat(values) for values in zip(*(part.saved for part in parts), strict=True))
    counts = [part.fallback for part in parts if part.fallback is not None]
    return Forward(outputs, saved, torch.stack(counts).sum() if counts else None)


def returned(found: Forward, options: Options) -> tuple[Tensor | None, ...]:
    """The outputs of an autograd function in the order of :class:`PolicyStats`."""
    outputs = {name: found.outputs[name] for name in options.want} | {"num_fallback": found.fallback}
    return tuple(outputs.get(name) for name in OUTPUTS)


def without_gradient(outputs: tuple[Tensor | None, ...], options: Options) -> list[Tensor]:
    """Those of ``returned`` that carry none."""
    return [o for name, o in zip(OUTPUTS, outputs, strict=True) if o is not None and name not in options.grad]


def given(upstream: Sequence[Tensor | None], options: Options) -> dict[str, Tensor]:
    """The upstream gradients ``[T]`` by name, from those in the order of :class:`PolicyStats`."""
    named = zip(OUTPUTS, upstream, strict=True)
    return {name: value for name, value in named if value is not None and name in options.grad}


def inverse_temperature(temperature: float | Tensor, T: int, like: Tensor) -> Tensor:
    """1 / temperature ``[T, 1]`` in the dtype of the arithmetic: fp32, or fp64 for fp64 logits."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        scale = temperature.detach().to(like.device).double().reciprocal().to(dtype)
    else:  # filled on the device: a copy from the host would wait for it
        scale = torch.full((), 1 / temperature, dtype=dtype, device=like.device)
    return scale.expand(T)[:, None]


def checked_options(
    caller: str,
    *,
    T: int,
    dtype: torch.dtype,
    shard: VocabShard,
    targets: Tensor,
    temperature: float | Tensor,
    top_p: float | None,
    min_p: float | None,
    nucleus: str,
    want: Sequence[str],
    grad: Sequence[str],
    num_candidates: int,
    support: Support | None,
    deterministic: bool,
) -> Options:
    """The options of a call. Raises ValueError, naming the caller, for arguments that do not fit together."""
    known = [name for name in OUTPUTS if name != "num_fallback"]
    wants_nucleus = any(name in NUCLEUS for name in want)
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{caller}: logits are {dtype}, expected bfloat16, float32 or float64")
    if targets.shape != (T,) or targets.dtype != torch.int64:
        raise ValueError(f"{caller}: targets are {targets.dtype} {list(targets.shape)}, expected int64 [{T}]")
    if isinstance(temperature, Tensor) and temperature.shape not in ((), (T,)):
        raise ValueError(f"{caller}: temperature is {list(temperature.shape)}, expected a number or [{T}]")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{caller}: temperature is {temperature}, expected more than 0")
    if unknown := [name for name in want if name not in known]:
        raise ValueError(f"{caller}: want has unknown outputs {unknown}; known are {known}")
    if wrong := [name for name in grad if name not in want or name not in (*DIFFERENTIABLE, *SUPPORT)]:
        expected = [*DIFFERENTIABLE, *SUPPORT]
        raise ValueError(f"{caller}: grad names {wrong}; expected wanted outputs among {expected}")
    by_mass, by_probability = top_p is not None and 0 < top_p <= 1, min_p is not None and 0 < min_p < 1
    if wants_nucleus and not (by_mass and min_p is None or by_probability and top_p is None):
        raise ValueError(
            f"{caller}: nucleus outputs need top_p in (0, 1], or in its place min_p in (0, 1); found top_p {top_p}, "
            f"min_p {min_p}"
        )
    if nucleus not in ("inclusive", "exclusive"):
        raise ValueError(f"{caller}: nucleus is {nucleus!r}, expected 'inclusive' or 'exclusive'")
    if num_candidates < 1:
        raise ValueError(f"{caller}: num_candidates is {num_candidates}, expected at least 1")
    if deterministic and targets.device.type != "cpu":
        raise ValueError(
            f"{caller}: deterministic=True runs on a CPU alone, found tensors on {targets.device}; the Triton kernels "
            "add in an order that the layout decides: leave it False there"
        )
    if support is None and (of_support := [name for name in want if name in SUPPORT]):
        raise ValueError(f"{caller}: want has {of_support}, which are of a support: pass support=, found None")
    if support is not None:
        support.check(caller, T, shard.vocab_size, targets.device)
    rule = NucleusRule(1.0 if top_p is None else top_p, nucleus, min_p) if wants_nucleus else None
    return Options(shard, rule, tuple(want), tuple(grad), num_candidates, deterministic)

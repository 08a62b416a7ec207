"""Surrogates: the loss per token of GRPO and of every method derived from it, as one option.

After the first update of a step the policy that learns is no longer the one that sampled. A surrogate says how a token
counts that has become more or less likely since: dropped beyond a range, or kept with a bounded weight.

``surrogate = "gspo"`` takes one with its own defaults; a table has its ``kind`` and options:
``surrogate = {kind = "gspo", clip_high = 1e-3}``. With r_t = exp(logp_t - logp_old_t), A_t the advantage as the method
shapes it, and sg() a constant, the loss per token is

    ppo      max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))      the method's own clip_low, clip_high and dual_clip
    gspo     the same of s_t in the place of r_t, s_t = sg(s_i) exp(logp_t - sg(logp_t)),
             s_i = exp(mean of logp - logp_old over the tokens of response i)
    cispo    -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp
    sapo     -A (4 / tau) sigmoid(tau (r - 1)),  tau = tau_pos where A > 0, else tau_neg
    minirl   -sg(r) A logp where ppo would not clip, else 0
    topr     -sg(w) A logp,  w = 1 where A >= 0, else min(R_i, 1),  R_i = product of r over the tokens of response i

The gradient of each is -w A grad(logp), with a weight w per token: the metric ``surrogate/weight``.

- gspo (arXiv 2507.18071) is the paper's GSPO-token: one ratio and one decision a response, a gradient a token, so that
  advantages per token compose. With one advantage a response and seq-mean-token-mean it is GSPO.
- cispo (arXiv 2506.13585, eq. 4 and 5) has no lower bound in the paper, which does not state its upper one: weights up
  to 5 are what TRL and SkyRL take from ScaleRL (arXiv 2510.13786). verl and Trinity-RFT bound it by the range of ppo,
  at 1.2 and 1.28. ``clip_high = 0`` is importance sampling truncated at 1.
- sapo (arXiv 2511.20347) has no range: its weight falls smoothly on both sides of r = 1.
- minirl (arXiv 2512.01374, eq. 7) weighs by pi / mu, mu the engine's policy. r is pi / pi_old; the other factor is
  ``importance.mode = "truncate"``, which truncates that factor where the paper truncates pi / mu, at 5.
- topr (arXiv 2503.14286) goes by the sign of the advantage; in the paper it is that of the reward, with or without a
  baseline. ``level = "token"`` takes r_t for R_i, as Trinity-RFT and ROLL do.

Scope. A response is never split over micro-batches or ranks: s_i and R_i are those of the whole response under every
layout. Means and products run over its tokens that train, also where a method trains on some of them.

What composes. A method's advantages, token weights, masks and regularisers stand beside every surrogate, and
``importance.mode`` multiplies its loss. Four methods say something about the clipped loss itself: under ppo KL-Cov and
the authors' variant of SENT clip nothing, another surrogate they take as it is; Clip-Cov chooses among the tokens whose
weight is not 0; EntroPIC's control term on likely tokens is the surrogate without its range. CE-GPPO, ERC-GPPO, MAI's
clip and ADAPO are clips themselves, and refuse another. A method's ``clip_low``, ``clip_high`` and ``dual_clip`` are
ppo's: beside another surrogate any but their defaults are an error. In a step of one update every ratio is 1, and all
surrogates have the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import log_ratio
from megatron_ext.plugins import check_options, options_of_class, suggest
from megatron_ext.types import Batch

Kind = Literal["ppo", "gspo", "cispo", "sapo", "minirl", "topr"]


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A loss per token ``[T]`` of log-probs ``[T]`` and advantages ``[T]``, which are constants.

    A subclass gives ``weight``, and ``loss`` where it is not that of a weighted log-prob.
    """

    kind: ClassVar[str]
    paper: ClassVar[str]  # arXiv
    beside: ClassVar[str] = ""  # options of the method and of [importance] that the paper has with it

    def loss(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return -self.weight(batch, logprob, advantage) * advantage * logprob

    def unclipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        """The loss without its clip range, where it has one."""
        return self.loss(batch, logprob, advantage)

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        """w of the gradient -w A grad(logp), a constant."""
        raise NotImplementedError

    def clipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are dropped or bounded at the lower and at the upper end, ``[T]`` bool each."""
        none = torch.zeros_like(batch.mask)
        return none, none

    def check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"surrogate.{name}: found {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Ranged(Surrogate):
    """A surrogate of a ratio that counts from ``1 - clip_low`` to ``1 + clip_high``."""

    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            self.check(name, getattr(self, name) >= 0, "a number of at least 0")

    def ratio(self, batch: Batch, logprob: Tensor) -> Tensor:
        return log_ratio(logprob, batch.old_logprob).exp()

    def unclipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return -self.ratio(batch, logprob.detach()) * advantage * logprob

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        low, high = self.clipped(batch, logprob, advantage)
        return torch.where(low | high, 0.0, self.ratio(batch, logprob.detach()))

    def clipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self.ratio(batch, logprob.detach())
        return (advantage < 0) & (ratio < 1 - self.clip_low), (advantage > 0) & (ratio > 1 + self.clip_high)


@dataclass(frozen=True, kw_only=True)
class Clipped(Ranged):
    """The pessimistic one of the ratio and the clipped ratio."""

    def loss(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        ratio = self.ratio(batch, logprob)
        return torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - self.clip_low, 1 + self.clip_high))

    def unclipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return -advantage * self.ratio(batch, logprob)


@dataclass(frozen=True, kw_only=True)
class PPO(Clipped):
    kind: ClassVar[str] = "ppo"
    paper: ClassVar[str] = "1707.06347"
    dual_clip: float | None = None

    def loss(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        loss = self.unbounded(batch, logprob, advantage)
        if self.dual_clip is None:
            return loss
        return torch.where(advantage < 0, torch.min(loss, -advantage * self.dual_clip), loss)

    def unbounded(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        """The loss without ``dual_clip``."""
        return super().loss(batch, logprob, advantage)

    def factor(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        """The weight without ``dual_clip``."""
        return super().weight(batch, logprob, advantage)

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        weight = self.factor(batch, logprob, advantage)
        if self.dual_clip is None:
            return weight
        return torch.where((advantage < 0) & (weight > self.dual_clip), 0.0, weight)


@dataclass(frozen=True, kw_only=True)
class Unclipped(PPO):
    """``-A r`` on every token, for methods that hold the policy by other means than a clip range.

    ``clipped`` still tells what is beyond the range.
    """

    def loss(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return self.unclipped(batch, logprob, advantage)

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return self.ratio(batch, logprob.detach())


@dataclass(frozen=True, kw_only=True)
class GSPO(Clipped):
    kind: ClassVar[str] = "gspo"
    paper: ClassVar[str] = "2507.18071"
    beside: ClassVar[str] = '`aggregation = "seq-mean-token-mean"`'
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def ratio(self, batch: Batch, logprob: Tensor) -> Tensor:
        """s_t: the value of s_i, the gradient of s_i logp_t."""
        moved, count = response_sums(batch, logprob)
        mean = batch.token((moved / count.clamp(min=1)).clamp(-20.0, 20.0)).to(logprob.dtype)
        return (logprob - logprob.detach() + mean).exp()


@dataclass(frozen=True, kw_only=True)
class CISPO(Ranged):
    kind: ClassVar[str] = "cispo"
    paper: ClassVar[str] = "2506.13585"
    beside: ClassVar[str] = '`aggregation = "token-mean"`'
    clip_low: float = 1.0
    clip_high: float = 4.0

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return self.ratio(batch, logprob.detach()).clamp(1 - self.clip_low, 1 + self.clip_high)

    def clipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        ratio, counts = self.ratio(batch, logprob.detach()), advantage != 0
        return counts & (ratio < 1 - self.clip_low), counts & (ratio > 1 + self.clip_high)


@dataclass(frozen=True, kw_only=True)
class SAPO(Surrogate):
    kind: ClassVar[str] = "sapo"
    paper: ClassVar[str] = "2511.20347"
    beside: ClassVar[str] = '`aggregation = "seq-mean-token-mean"`'
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            self.check(name, getattr(self, name) > 0, "a temperature above 0")

    def loss(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        gate, tau, _ = self.gate(batch, logprob, advantage)
        return -advantage * gate * 4 / tau

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        gate, _, ratio = self.gate(batch, logprob.detach(), advantage)
        return 4 * gate * (1 - gate) * ratio

    def gate(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sigmoid(tau (r - 1)), tau, and r, ``[T]`` each."""
        ratio = log_ratio(logprob, batch.old_logprob).exp()
        tau = torch.where(advantage > 0, self.tau_pos, self.tau_neg).to(ratio.dtype)
        return torch.sigmoid(tau * (ratio - 1)), tau, ratio


@dataclass(frozen=True, kw_only=True)
class MiniRL(Ranged):
    kind: ClassVar[str] = "minirl"
    paper: ClassVar[str] = "2512.01374"
    beside: ClassVar[str] = (
        '`aggregation = "seq-mean-token-sum"`, `normalise = false`; `importance.mode = "truncate"`, `cap = 5`'
    )
    clip_low: float = 0.2
    clip_high: float = 0.27


@dataclass(frozen=True, kw_only=True)
class TOPR(Surrogate):
    kind: ClassVar[str] = "topr"
    paper: ClassVar[str] = "2503.14286"
    beside: ClassVar[str] = '`aggregation = "seq-mean-token-sum"`'
    level: Literal["sequence", "token"] = "sequence"

    def weight(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> Tensor:
        return torch.where(advantage < 0, self.moved(batch, logprob).clamp(max=0.0).exp(), 1.0)

    def clipped(self, batch: Batch, logprob: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(batch.mask), (advantage < 0) & (self.moved(batch, logprob) > 0)

    def moved(self, batch: Batch, logprob: Tensor) -> Tensor:
        """log R_i of each token's response, or log r_t."""
        if self.level == "token":
            return log_ratio(logprob.detach(), batch.old_logprob)
        return batch.token(response_sums(batch, logprob)[0]).to(logprob.dtype)


KINDS: dict[str, type[Surrogate]] = {cls.kind: cls for cls in (PPO, GSPO, CISPO, SAPO, MiniRL, TOPR)}


def create(given: str | Mapping[str, Any], ppo: PPO) -> Surrogate:
    """The surrogate that the option names; ``ppo`` is the method's own. Raises ValueError."""
    options: dict[str, Any] = {"kind": given} if isinstance(given, str) else dict(given)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"surrogate.kind: found {kind!r}; {suggest(str(kind), KINDS)}")
    known = {} if kind == ppo.kind else options_of_class(KINDS[kind])  # those of ppo are the method's
    check_options(options, known, section="surrogate", owner=kind)
    return ppo if kind == ppo.kind else KINDS[kind](**options)


def options_of(kind: str) -> dict[str, Any]:
    """The options of a surrogate with their defaults; of ppo none, since they are the method's."""
    return {} if kind == PPO.kind else asdict(KINDS[kind]())


def described(kind: str) -> str:
    """The table of a recipe that names a surrogate and each of its options."""
    options = {"kind": kind} | options_of(kind)
    return f"{{{', '.join(f'{name} = {value!r}' for name, value in options.items())}}}"


def response_sums(batch: Batch, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """``logp - logp_old`` over the tokens of each response that train, fp64 ``[B]``, a constant; and their number."""
    moved = torch.where(batch.mask, (logprob.detach() - batch.old_logprob).double(), 0.0)
    zeros = moved.new_zeros(len(batch.reward))
    return zeros.index_add(0, batch.sequence, moved), zeros.index_add(0, batch.sequence, batch.mask.double())

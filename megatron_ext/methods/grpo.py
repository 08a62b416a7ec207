"""GRPO: group-relative policy optimisation (arXiv 2402.03300; eq. 3 of SIREN, arXiv 2509.25133).

A reward alone does not say whether a response is better than was to be expected, and a critic that says it is another
model to train. GRPO samples several responses to each problem and compares each with the others.

    A_i = (R_i - mean(R of the group)) / (std(R of the group) + 1e-6),  std with ddof 1
    r_t = exp(logp_t - logp_old_t)
    L   = mean_i mean_t [ max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + beta * k3 ]
    k3  = exp(ref - logp) - (ref - logp) - 1,  clamped to +-10

A group of one and a group with equal rewards have A = 0 (in verl's code a group of one has its reward).
``aggregation = "token-mean"`` divides by all tokens of the mini-batch instead (verl's default), ``normalise = false``
leaves the standard deviation out. ``dual_clip = c`` bounds the loss of negative advantages by -c A (0: not; verl has it
silently on with c = 3). The only statistics are those of the groups, which are never split. ``surrogate`` puts another
loss in the place of the clipped one, here and in every method derived from this one (docs/surrogates.md).

Every other method is this one with a part replaced: its advantage, its token weight, its loss per token,
or a regulariser added to it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_ext.methods import surrogates
from megatron_ext.methods.base import Aggregation, Method, Needs, Prepared, group_statistics, log_ratio
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class GRPO(Method):
    aggregation: Aggregation = "seq-mean-token-mean"
    normalise: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0  # coefficient of the KL to the reference model
    dual_clip: float | None = None
    surrogate: surrogates.Kind | dict[str, Any] = "ppo"
    group_relative: ClassVar[bool] = True
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="loss/policy", section="Update", title="Loss", unit="loss",
            meaning="the method's policy loss, without regularisers"),
        Metric(name="clip/low", section="Update", title="Clipped tokens", unit="share of tokens",
            meaning="tokens of negative advantage whose probability ratio is below 1 - clip_low; of another surrogate "
            "those that it drops or bounds at its lower end", good="a few percent at most",
            high="the policy moves far in one step: lower optimizer.lr or the number of updates per step"),
        Metric(name="clip/high", section="Update", title="Clipped tokens", unit="share of tokens", short="clipped",
            meaning="tokens of positive advantage whose probability ratio is above 1 + clip_high; of another surrogate "
            "those that it drops or bounds at its upper end", good="a few percent at most", high="as clip/low"),
        Metric(name="surrogate/weight", section="Update", title="Weight of a token", unit="mean over tokens",
            meaning="w of the policy's gradient -w A grad(log-prob); of another surrogate than ppo", good="near 1",
            low="most tokens are dropped: the surrogate's range is narrow for how far the policy moves in one step",
            high="tokens that became likelier dominate: lower optimizer.lr or the number of updates per step"),
        Metric(name="kl/old", section="Update", title="KL", unit="nats per token",
            meaning="KL(sampling policy || current one), k3 estimate", good="small; 0 with one update",
            high="the policy moves far in one step: lower optimizer.lr or the number of updates per step"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "beta"):
            self.check(name, getattr(self, name) >= 0, "a number of at least 0")
        self.check("dual_clip", not self.dual_clip or self.dual_clip > 1, "a number above 1, or 0 for none")
        if isinstance(self.policy_surrogate, surrogates.PPO):
            return
        alone = "ppo: this method is a clip of its own, and another surrogate would leave nothing of it"
        self.check("surrogate", not self.is_surrogate, alone)
        kind, defaults = self.policy_surrogate.kind, {option.name: option.default for option in fields(self)}
        for name in ("clip_low", "clip_high", "dual_clip"):
            others = f"{name} is of the surrogate ppo alone; {kind} has {surrogates.described(kind)}"
            self.check(name, getattr(self, name) == defaults[name], f"{defaults[name]}, its default: {others}")

    @property
    def is_surrogate(self) -> bool:
        """Whether all of the method is in ``ppo_surrogate``."""
        return False

    @property
    def policy_surrogate(self) -> surrogates.Surrogate:
        """What the option ``surrogate`` names; as it is now, since a method's own clip may move."""
        return self.other_surrogate or self.ppo_surrogate

    @cached_property
    def other_surrogate(self) -> surrogates.Surrogate | None:
        """What the option ``surrogate`` names where that is not ppo, read once."""
        found = surrogates.create(self.surrogate, self.ppo_surrogate)
        return None if isinstance(found, surrogates.PPO) else found

    @property
    def ppo_surrogate(self) -> surrogates.PPO:
        """What ``surrogate = "ppo"`` is here."""
        return surrogates.PPO(clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip or None)

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.beta > 0)

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        mean, std, _ = group_statistics(reward_B, group_B)
        advantage = (reward_B - mean) / (std + 1e-6) if self.normalise else reward_B - mean
        return torch.where(reward_B.isnan(), 0.0, advantage)

    def loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        loss = self.policy_loss(batch, stats, prepared)
        if self.beta > 0:
            assert batch.ref_logprob is not None
            loss = loss + self.beta * k3(stats.logprob, batch.ref_logprob)
        return self.weight(batch, prepared) * loss + self.regulariser(batch, stats, prepared)

    def weight(self, batch: Batch, prepared: Prepared) -> Tensor:
        """The aggregation per token, ``[T]``; ``prepare`` may replace it."""
        return prepared.token.get("weight", batch.weight)

    def advantage(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        """The advantage per token, ``[T]``, a constant."""
        return batch.advantage

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        """The surrogate's loss per token, unweighted, ``[T]``."""
        advantage = self.advantage(batch, stats, prepared)
        return batch.corrected(self.policy_surrogate.loss(batch, stats.logprob, advantage))

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor | float:
        """What a method adds to the objective, per token and weighted, ``[T]``."""
        return 0.0

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        surrogate, advantage = self.policy_surrogate, self.advantage(batch, stats, prepared)
        low, high = surrogate.clipped(batch, stats.logprob, advantage)
        found = {
            "loss/policy": (self.weight(batch, prepared) * self.policy_loss(batch, stats, prepared)).sum(),
            "clip/low": (batch.mask & low).sum(),
            "clip/high": (batch.mask & high).sum(),
            "kl/old": torch.where(batch.mask, k3(batch.old_logprob, stats.logprob), 0.0).sum(),
        }
        if not isinstance(surrogate, surrogates.PPO):
            weight = surrogate.weight(batch, stats.logprob, advantage)
            found["surrogate/weight"] = torch.where(batch.mask, weight, 0.0).sum()
        return found


def k3(logprob: Tensor, other: Tensor) -> Tensor:
    """The low-variance estimate of KL(policy || other) at sampled tokens, clamped to +-10."""
    difference = log_ratio(other, logprob)
    return (difference.exp() - difference - 1).clamp(-10.0, 10.0)

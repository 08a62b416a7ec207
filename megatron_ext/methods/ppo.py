"""PPO with a critic, as the paper of entropy advantage runs it (arXiv 1707.06347, 1506.02438; arXiv 2506.14758).

A group's mean says how good a response is as a whole, but not where in it things went well, and it needs several
responses to each problem. PPO trains a critic that predicts the reward at every token, and compares with that.

    delta_t = r_t + gamma V_{t+1} - V_t,  r = R_i on the last token of response i and 0 before,  V = 0 after the last
    A_t     = delta_t + gamma lam A_{t+1}                                      (GAE; lam = gamma = 1: A_t = R_i - V_t)
    G_t     = A_t + V_t                                                        (the return, what V learns)
    A_t    <- (A_t - mean(A)) / sqrt(var(A) + 1e-8),  var with ddof 1
    L       = (1/N) sum_t max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  clip .2 / .28, no KL
    L_V     = (1/N) sum_t .5 max((v - G)^2, (V + clip(v - V, +-value_clip) - G)^2)

V_t is the critic's value where response token t is predicted, before the step's first update; v its value as it is
updated, on the policy's mini-batches and before the policy. mean and var run over the valid tokens of the whole step
and all ranks, N over those of the mini-batch: no split or layout changes the result. ``normalise = false`` leaves the
whitening out. The policy sits out the first ``critic_only_steps`` steps. Groups play no part. The paper's rewards are
+-1. Overlong shaping (clip_higher.py) is an option here too.
Differs from the authors' code (verl): there the loss of a micro-batch is the mean over its own tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.methods.base import Needs, Reducer, num_selected, token_mean
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.metric import Metric
from megatron_ext.types import Advantages, Batch, RolloutBatch, TokenStats


@dataclass(kw_only=True)
class PPO(ClipHigher):
    gamma: float = 1.0
    lam: float = 1.0
    value_clip: float = 0.5
    critic_only_steps: int = 10
    group_relative: ClassVar[bool] = False
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="critic/value", section="Critic", title="Value", unit="reward",
            meaning="mean value that the critic predicts", good="near critic/return"),
        Metric(name="critic/return", section="Critic", title="Value", unit="reward",
            meaning="mean return that the critic learns"),
        Metric(name="critic/explained_variance", section="Critic", title="Explained variance", unit="share of variance",
            meaning="how much of the returns' variance the critic explains; missing where all returns are equal",
            good="above 0 and rising",
            low="0: the critic is no better than a constant; raise critic.lr or critic_only_steps"),
        Metric(name="critic/clipped", section="Critic", title="Clipped values", unit="share of tokens",
            meaning="values that value_clip stops: they moved further in one step, away from the return",
            good="small", high="lower critic.lr"),
        Metric(name="loss/value", section="Update", title="Loss", unit="loss",
            meaning="the critic's loss"),
    )  # fmt: skip
    step: int = field(default=0, init=False)  # steps begun

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", 0 < self.gamma <= 1, "a discount above 0 and at most 1")
        self.check("lam", 0 <= self.lam <= 1, "a number from 0 to 1")
        self.check("value_clip", self.value_clip > 0, "a number above 0")
        self.check("critic_only_steps", self.critic_only_steps >= 0, "a number of steps of at least 0")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, value=True)

    @property
    def updates_policy(self) -> bool:
        return self.step > self.critic_only_steps

    def policy_steps(self, steps: int) -> int:
        return max(0, steps - self.critic_only_steps)

    def compute_advantages(self, rollouts: RolloutBatch, reduce: Reducer) -> Advantages:
        value = rollouts.old_value
        assert value is not None
        reward = self.rewards(rollouts).nan_to_num()  # responses without a reward do not train
        advantage = gae(reward, value, rollouts.sequence, gamma=self.gamma, lam=self.lam)
        returns = advantage + value
        if self.normalise:
            mean, variance = mean_and_variance(advantage, rollouts.mask, reduce)
            advantage = (advantage - mean) / math.sqrt(variance + 1e-8)
        advantage = torch.where(rollouts.mask, advantage, 0.0)
        return Advantages(advantage.to(value.dtype), returns.to(value.dtype))

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        assert batch.old_value is not None and batch.returns is not None
        self.step += 1
        mean, variance = mean_and_variance(batch.returns, batch.mask, reduce)
        _, unexplained = mean_and_variance(batch.returns - batch.old_value, batch.mask, reduce)
        return super().on_step_start(batch, stats, reduce) | {
            "critic/value": token_mean(batch.old_value, batch.mask, reduce),
            "critic/return": mean,
            # where all returns are equal but for rounding there is nothing to explain
            "critic/explained_variance": 1 - unexplained / variance if variance > 1e-8 else math.nan,
        }

    def value_loss(self, batch: Batch, value: Tensor) -> Tensor:
        loss = torch.maximum(self.squares(batch, value), self.squares(batch, self.near(batch, value)))
        return torch.where(batch.mask, loss, 0.0) / max(batch.num_tokens, 1)

    def value_metrics(self, batch: Batch, value: Tensor) -> dict[str, Tensor]:
        stopped = self.squares(batch, self.near(batch, value)) > self.squares(batch, value)
        return {"loss/value": self.value_loss(batch, value).sum(), "critic/clipped": (batch.mask & stopped).sum()}

    def near(self, batch: Batch, value: Tensor) -> Tensor:
        """The value, at most ``value_clip`` away from what it was before the step, ``[T]``."""
        assert batch.old_value is not None
        return batch.old_value + (value - batch.old_value).clamp(-self.value_clip, self.value_clip)

    def squares(self, batch: Batch, value: Tensor) -> Tensor:
        assert batch.returns is not None
        return 0.5 * (value - batch.returns) ** 2


def gae(reward_B: Tensor, value: Tensor, sequence: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates of packed tokens: ``[B]``, ``[T]``, ``[T] -> [T]`` in fp64."""
    length = torch.bincount(sequence, minlength=len(reward_B))
    end = length.cumsum(0)
    advantage = torch.zeros_like(value, dtype=torch.float64)
    ahead = advantage.new_zeros(len(reward_B))  # the advantage and the value of the token after this one
    ahead_value = torch.zeros_like(ahead)
    for back in range(1, int(length.max()) + 1 if len(length) else 0):
        those = torch.nonzero(length >= back)[:, 0]
        at = end[those] - back
        reward, own = reward_B[those].double() if back == 1 else 0.0, value[at].double()
        ahead[those] = reward + gamma * ahead_value[those] - own + gamma * lam * ahead[those]
        ahead_value[those] = own
        advantage[at] = ahead[those]
    return advantage


def mean_and_variance(value: Tensor, mask: Tensor, reduce: Reducer) -> tuple[float, float]:
    """Over the masked tokens of all ranks, ddof 1; variance 0 where there are fewer than two."""
    mean, count = token_mean(value, mask, reduce), num_selected(mask, reduce)
    return mean, token_mean((value.double() - mean) ** 2, mask, reduce) * count / max(count - 1, 1)

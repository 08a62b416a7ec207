"""EntroPIC's theorems on a policy small enough to be exact: softmax tables, expected gradients, fp64.

The loss is the repository's own (megatron_ext/methods/entropic.py). Every state, action and outcome is one token,
weighted by its probability, so the sum that the trainer estimates from samples is here the expectation itself. One
step is one step of the controller and one plain gradient step on the logits.

What decides whether proportional control alone reaches its target is the drift that the entropy has of its own. The
table is a task in its late phase, the one that long training is about: a state has two equally good actions, one of
them likelier, and four bad ones. The good ones earn the reward with probability .6, the bad ones with .1.

    on-policy    The samples are the policy's own. Bad actions die out, and between equals the policy gradient is
                 zero: the drift vanishes, and P control converges to the target.
    off-policy   A share of the samples comes from an older policy (here uniform) and is not reweighted. Bad actions
                 stay in the batch for ever. Pushing them down lifts the likelier of the good ones most: the drift is
                 lasting, P control balances it with a lasting error of its own, and the integral removes the error.
    with ratio   The same samples, each weighted by policy / sampling policy as in the loss of Theorem 4.3 (and clipped,
                 as the repository's loss is). Reweighted, they are the policy's own in expectation: the drift vanishes
                 again, and P control converges. The steady error that the theorem ascribes to the shift of the
                 distribution does not appear here; the one above belongs to samples without the ratio.

Why the full form cannot hold an entropy. With p_a the success of an action, V the mean over the policy and A = R - V,
the expectation of (1 + alpha sgn A) A given the action, less its mean over the policy, is

    (p_a - V) (1 + alpha (1 - 2 V)),

whose second factor is never negative while |alpha| <= 1: control changes the speed at which entropy falls, not the
sign. (The high-probability form pushes against the likely action itself, whatever it earns.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import OneRank
from megatron_ext.methods.entropic import EntroPIC
from megatron_ext.types import Batch, TokenStats

GOOD, BAD = 0.6, 0.1  # probability of reward 1
NUM_GOOD, NUM_ACTIONS = 2, 6
ABOVE, BELOW = 0.8, 3.0  # leads of the first action, in logits, that start above and below the target
STALE = 0.05


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run: a start, a controller, and where the samples come from. Entropies in nats."""

    lead: float = ABOVE
    stale: float = 0.0  # share of the samples drawn uniformly
    ratio: bool = False  # samples of the older policy are reweighted, by the loss's own (clipped) ratio
    k_p: float = 4.0
    k_i: float = 0.02
    form: Literal["high_probability", "full"] = "high_probability"
    target: float = 0.4
    threshold: float = 0.5
    lr: float = 1.0
    steps: int = 1200


SETTINGS = {
    f"{name}, {place}, from {start}": Setting(lead=lead, stale=stale, ratio=ratio, k_i=k_i)
    for place, stale, ratio in (
        ("on-policy", 0.0, False),
        ("off-policy", STALE, False),
        ("off-policy with ratio", STALE, True),
    )
    for start, lead in (("above", ABOVE), ("below", BELOW))
    for name, k_i in (("P", 0.0), ("PI", 0.02))
} | {"PI, on-policy, full form": Setting(form="full")}


@dataclass(frozen=True)
class Curve:
    """Per step, before its update: entropy in nats, the controller's output, expected reward."""

    setting: Setting
    entropy: list[float]
    alpha: list[float]
    reward: list[float]

    @property
    def error(self) -> float:
        """Mean distance of the entropy from the target over the last tenth of the steps."""
        tail = self.entropy[-max(1, len(self.entropy) // 10) :]
        return sum(tail) / len(tail) - self.setting.target


@cache
def simulate(setting: Setting) -> Curve:
    """Train a table of one state with EntroPIC's own controller and loss. Exact, so asked once."""
    success = torch.full((1, NUM_ACTIONS), BAD, dtype=torch.float64)
    success[:, :NUM_GOOD] = GOOD
    logits = torch.zeros_like(success)
    logits[:, :NUM_GOOD] = setting.lead
    logits[:, 0] += setting.lead
    logits.requires_grad_()
    method = EntroPIC(
        target=setting.target, k_p=setting.k_p, k_i=setting.k_i, form=setting.form, threshold=setting.threshold
    )
    curve = Curve(setting, [], [], [])
    for _ in range(setting.steps):
        logprob = logits.log_softmax(-1)
        policy = logprob.detach().exp()
        drawn = (1 - setting.stale) * policy + setting.stale / NUM_ACTIONS
        batch, stats = enumerated(success, logprob, drawn, ratio=setting.ratio)
        plan = method.prepare(batch, stats.detach(), OneRank())
        (gradient,) = torch.autograd.grad(method.loss(batch, stats, plan).sum(), logits)
        curve.entropy.append(plan.report["entropic/entropy"])
        curve.alpha.append(plan.report["entropic/alpha"])
        curve.reward.append(float((policy * success).sum(1).mean()))
        with torch.no_grad():
            logits -= setting.lr * gradient
    return curve


def enumerated(success: Tensor, logprob: Tensor, drawn: Tensor, *, ratio: bool = False) -> tuple[Batch, TokenStats]:
    """Every (state, action, outcome) as a response of one token, T = 2 S A of them, weighted by its probability.

    All ``[S, A]``: ``success`` the probability of reward 1, ``logprob`` the policy, ``drawn`` the probabilities with
    which the samples were drawn. The advantage is the limit of GRPO's for a large group, (R - V) / sqrt(V (1 - V)).
    With ``ratio`` the loss divides by ``drawn``; otherwise it takes the policy for the one that sampled.
    """
    num_states, num_actions = success.shape
    size = 2 * num_states * num_actions
    chance = torch.stack([success, 1 - success], -1)  # [S, A, 2]
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(chance)
    value = (drawn * success).sum(1)[:, None, None]
    advantage = (reward - value) / (value * (1 - value)).sqrt()
    logprob_T = logprob[:, :, None].expand_as(chance).reshape(size)
    entropy = -(logprob.exp() * logprob).sum(1)[:, None, None].expand_as(chance)
    sampled_T = drawn.log()[:, :, None].expand_as(chance).reshape(size) if ratio else logprob_T.detach()
    all_of_them = torch.ones(size, dtype=torch.bool)
    batch = Batch(
        sequence=torch.arange(size),
        mask=all_of_them,
        weight=(drawn[:, :, None] * chance / num_states).reshape(size),
        old_logprob=sampled_T,
        rollout_logprob=sampled_T,
        ref_logprob=None,
        advantage=advantage.reshape(size),
        reward=reward.reshape(size),
        group=torch.arange(num_states).repeat_interleave(2 * num_actions),
        truncated=~all_of_them,
        num_sequences=size,
        num_tokens=size,
    )
    return batch, TokenStats(logprob=logprob_T, entropy=entropy.reshape(size))

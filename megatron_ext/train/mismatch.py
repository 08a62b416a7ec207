"""Where the rollout engine's distribution is not the trainer's: checked, counted, and corrected if asked.

The engine computes the same log-probs with other kernels, or other weights if something is wrong. Its own are in
``Sample.logprobs``, of the distribution that was sampled from: renormalised on what ``rollout.top_k``, ``min_p`` and
``top_p`` leave of the vocabulary. So are the trainer's under sampling replay. Without it they are the whole policy's.

    gap_t          = log mu(a_t) - log pi_old(a_t)                 the engine's mu, the trainer's pi_old
    importance_t   = min(exp(-gap_t), cap)                         truncated importance sampling, off by default

``train.importance_cap`` multiplies a token's policy loss by ``importance_t``, as if it had been drawn from pi_old with
the weight's tail cut off; regularisers keep their weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.config.schema import Config, RolloutConfig


class MismatchError(RuntimeError):
    """The rollout engine samples from another policy than the one that is trained. Exit code 3."""


def importance(old_logprob: Tensor, rollout_logprob: Tensor, cap: float) -> Tensor | None:
    """Weight of each token's policy loss, fp32 ``[T]``; None when ``cap`` is 0."""
    if cap == 0:
        return None
    return (old_logprob - rollout_logprob).clamp(max=math.log(cap)).exp()


def known(rollout_logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """The engine's log-probs, the trainer's where the engine reported NaN or an infinity (seen at low entropy)."""
    return torch.where(rollout_logprob.isfinite(), rollout_logprob, old_logprob)


def check(metrics: Mapping[str, float], config: Config) -> None:
    """Raise MismatchError when engine and trainer disagree by more than ``alarms.mismatch`` nats a token on average, or
    when the engine does not tell more than ``alarms.unknown_logprobs`` of its log-probs, which cannot be compared.

    Without sampling replay a nucleus may raise the engine's log-probs by up to ``-log(rollout.top_p)``, which is
    allowed for; top-k and min-p may raise them by any amount: then they are not compared.
    """
    share, unknown = config.alarms.unknown_logprobs, metrics["response/unknown_logprobs"]
    unknown /= max(metrics["response/length"], 1.0)
    if unknown > share:
        raise MismatchError(
            f"rollout: the engine does not tell the log-probs of {unknown:.3g} of its tokens, expected at most "
            f"{share:g} (alarms.unknown_logprobs): whether it samples from the policy cannot be checked. Try "
            "model.dtype=float32, then rollout.engine=hf; alarms.unknown_logprobs=1 turns this check off"
        )
    limit, found = config.alarms.mismatch, metrics["mismatch/mean"]
    allowed = limit + largest_rise(config.rollout)
    if not limit or found <= allowed:
        return
    raise MismatchError(
        f"rollout: the engine's log-probs differ from the trainer's by {found:.3g} nats a token on average, expected "
        f"at most {allowed:.3g} (alarms.mismatch = {limit:g}): it samples from other weights, or its precision is too "
        "low. Try model.dtype=float32, then rollout.engine=hf; alarms.mismatch=0 turns this check off"
    )


def largest_rise(rollout: RolloutConfig) -> float:
    """By how many nats the sampling distribution's log-prob of a token may lie above the trainer's."""
    if rollout.replays_sampling:
        return 0.0
    return math.inf if rollout.top_k or rollout.min_p else -math.log(rollout.top_p)

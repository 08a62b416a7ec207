"""Where the rollout engine's distribution is not the trainer's: checked, counted, and corrected if asked.

The engine computes the same log-probs with other kernels, or other weights if something is wrong. Its own are in
``Sample.logprobs``, of the distribution that was sampled from: renormalised on what ``rollout.top_k``, ``min_p`` and
``top_p`` leave of the vocabulary. So are the trainer's under sampling replay. Without it they are the whole policy's.

    rho_t = pi_old(y_t) / mu(y_t)                                  the trainer's pi_old, the engine's mu
    rho   = exp(mean of log rho_t over the response)               at importance.level "sequence", for all its tokens

    importance_t = min(rho_t, C)                                   importance.mode "truncate"
    importance_t = rho_t where 1 / C <= rho_t <= C, else 0         importance.mode "mask"

It multiplies a token's policy loss, as if the token had been drawn from pi_old with the weight's tail cut off.
Regularisers keep their weight, and the aggregation's denominators count masked tokens too (docs/corrections.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.config.schema import Config, ImportanceConfig, RolloutConfig
from megatron_ext.methods.base import Reducer, token_mean
from megatron_ext.types import Batch


class MismatchError(RuntimeError):
    """The rollout engine samples from another policy than the one that is trained. Exit code 3."""


def importance(
    old_logprob: Tensor, rollout_logprob: Tensor, sequence: Tensor, config: ImportanceConfig
) -> Tensor | None:
    """Weight of each token's policy loss, fp32 ``[T]``; None when the mode is "off".

    ``sequence [T]`` numbers the responses, each of which is whole: none is split over ranks.
    """
    if config.mode == "off":
        return None
    log_ratio = old_logprob - rollout_logprob
    if config.level == "sequence" and len(log_ratio):
        mean_B = torch.segment_reduce(log_ratio.double(), "mean", lengths=torch.bincount(sequence))
        log_ratio = mean_B.float()[sequence]
    if config.mode == "truncate":
        return log_ratio.exp().clamp(max=config.cap)
    return torch.where(log_ratio.abs() <= math.log(config.cap), log_ratio.exp(), 0.0)


def corrections(batch: Batch, config: ImportanceConfig, reduce: Reducer) -> dict[str, float]:
    """How much is corrected: the mean weight, and the share of the valid tokens that are truncated or masked."""
    if batch.importance is None:
        return {}
    weight = batch.importance
    name, counted = ("truncated", weight >= config.cap) if config.mode == "truncate" else ("masked", weight == 0)
    return {
        "importance/weight": token_mean(weight, batch.mask, reduce),
        f"importance/{name}": token_mean(counted.float(), batch.mask, reduce),
    }


def known(rollout_logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """The engine's log-probs, the trainer's where the engine reported NaN or an infinity (seen at low entropy)."""
    return torch.where(rollout_logprob.isfinite(), rollout_logprob, old_logprob)


def check(metrics: Mapping[str, float], config: Config, *, lag: int = 0) -> None:
    """Raise MismatchError when the policy's own log-probs are not finite, when engine and trainer disagree by more than
    ``alarms.mismatch`` nats a token on average, or when the engine does not tell more than ``alarms.unknown_logprobs``
    of its log-probs, which cannot be compared.

    A batch that weights of ``lag`` steps before have sampled says nothing of the engine: the policy has moved since.

    Without sampling replay a nucleus may raise the engine's log-probs by up to ``-log(rollout.top_p)``, which is
    allowed for; top-k and min-p may raise them by any amount: then they are not compared.
    """
    if not math.isfinite(metrics["logprob/mean"]):
        raise MismatchError(
            f"train: the policy's own log-probs are not finite (their mean is {metrics['logprob/mean']}): its weights "
            "or its arithmetic are broken, and no update would mend them. Remove the newest checkpoints to go on from "
            "an older one, with a lower optimizer.lr or model.dtype=float32"
        )
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
    if not limit or lag or found <= allowed:
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

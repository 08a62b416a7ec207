"""Whether a step's rewards can be trusted, over all ranks: a pool (worker_pool.py) sees the answers of its own rank."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ext.rollout.rewards.worker_pool import MIN_ANSWERS_TO_TRIP, NO_VERDICT, VerifierError


def check(metrics: Mapping[str, float], num_responses: int, max_share: float) -> None:
    """Raise VerifierError where more than ``reward.max_timeout_share`` of a step's responses, 20 at least, have no
    verdict."""
    shares = {outcome.value: metrics.get(f"reward/outcome/{outcome.value}", 0.0) for outcome in NO_VERDICT}
    if num_responses < MIN_ANSWERS_TO_TRIP or sum(shares.values()) <= max_share:
        return
    found = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share)
    raise VerifierError(
        f"reward: {sum(shares.values()):.1%} of the step's {num_responses} responses have no verdict ({found}), "
        f"expected at most a share of reward.max_timeout_share = {max_share}. Mend the reward function, or, if the "
        "machine is overloaded, lower reward.workers or raise reward.deadline_s"
    )

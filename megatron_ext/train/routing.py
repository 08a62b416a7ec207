"""The experts that the rollout engine chose, checked before the trainer replays them, and compared with its own choice.

Under ``rollout.routing_replay`` every pass of the policy takes them: the one before the update, the update's own, and
those between updates. The reference and the critic, which did not sample, choose for themselves. Neither the engine nor
the trainer reads a response's last token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_ext.methods.base import Reducer
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import Policy
from megatron_ext.rollout.base import RolloutError
from megatron_ext.train import packing
from megatron_ext.types import Episode, Sample


def of_episodes(episodes: Sequence[Episode], policy: Policy) -> list[np.ndarray | None] | None:
    """``Sample.routing`` of each episode; None where the policy replays none. Raises RolloutError for a wrong one."""
    if policy.routing is None:
        return None
    for episode in episodes:
        if fault := _fault(episode.sample, policy.architecture):
            raise RolloutError(
                f"rollout.routing_replay: the engine's experts of a response {fault}: it samples from another model; "
                "set rollout.routing_replay = false to train without them"
            )
    return [episode.sample.routing for episode in episodes]


def begin_step(policy: Policy) -> None:
    """What ``describe`` says is of the passes from here on."""
    if policy.routing is not None:
        policy.routing.begin_count()


def describe(episodes: Sequence[Episode], policy: Policy, reduce: Reducer) -> dict[str, float]:
    """Metrics of the step's first passes; nothing where the policy replays nothing. Collective over all ranks."""
    if policy.routing is None:
        return {}
    read = [(num_read(e.sample), e.sample.routing is None) for e in episodes]
    counts = torch.tensor([sum(n for n, is_unknown in read if is_unknown), sum(n for n, _ in read)])
    unknown, total = reduce.sum(counts).tolist()
    return {"routing/differing": policy.routing.differing(), "routing/unknown": unknown / max(total, 1)}


def num_read(sample: Sample) -> int:
    """Tokens of which the engine has chosen experts."""
    return packing.num_read((sample.prompt_ids, sample.response_ids))


def _fault(sample: Sample, a: Architecture) -> str | None:
    assert a.experts is not None
    if sample.routing is None:
        return None
    expected = (num_read(sample), a.num_layers, a.experts.top_k)
    if sample.routing.shape != expected:
        return (
            f"have the shape {list(sample.routing.shape)}, expected {list(expected)} (tokens, layers, experts a token)"
        )
    experts = np.sort(sample.routing[:, [layer for layer in range(a.num_layers) if a.has_experts(layer)]], axis=-1)
    if experts.min() < 0 or experts.max() >= a.experts.num:
        return f"have the numbers {experts.min()} to {experts.max()}, expected 0 to {a.experts.num - 1}"
    if (experts[..., 1:] == experts[..., :-1]).any():
        return "name one expert twice for a token"
    return None

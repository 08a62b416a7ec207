"""What a step's batch looks like: rewards, lengths, entropies, rollout-vs-trainer mismatch, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch

from megatron_ext.methods.base import Reducer, group_statistics
from megatron_ext.rollout.rewards.outcome import OF_FUNCTIONS, Outcome, counted
from megatron_ext.types import Batch, Episode, TokenStats


def summarise(batch: Batch, old: TokenStats, episodes: Sequence[Episode], reduce: Reducer) -> dict[str, float]:
    """Means over the step's valid responses and tokens; shares of outcomes; counts of unusable groups.

    The nucleus is described where it was computed. ``mismatch/*`` compares the engine's log-probs with the trainer's
    for the same tokens and weights.
    """
    valid = ~batch.reward.isnan()
    _, std, size = group_statistics(batch.reward, batch.group)
    leaders = torch.cat([batch.group.new_ones(1), batch.group.diff()]) != 0  # first sequence of each group
    gap = (batch.rollout_logprob - batch.old_logprob).double()
    ids = list(Outcome)
    scored = torch.tensor([ids.index(counted(e.reward.outcome)) for e in episodes])
    has_advantage = torch.bincount(batch.sequence[batch.advantage != 0], minlength=len(batch.reward)) > 0
    per_sequence = {
        "reward/mean": torch.where(valid, batch.reward, 0.0),
        "response/length": torch.bincount(batch.sequence, minlength=len(batch.reward)),
        "prompt/length": torch.tensor([len(e.sample.prompt_ids) for e in episodes]),
        "response/truncated": batch.truncated,
        "response/unknown_logprobs": torch.tensor([sum(not isfinite(x) for x in e.sample.logprobs) for e in episodes]),
        "reward/nan": ~valid,
        "advantage/zero": ~has_advantage,
        **{f"reward/outcome/{outcome.value}": scored == i for i, outcome in enumerate(ids)},
    }
    per_group = {
        "group/equal_rewards": leaders & (std == 0),
        "group/solved": leaders & (std == 0) & (batch.reward > 0),
        "group/single": leaders & (size < 2),
    }
    entropies = {
        "entropy/full": old.entropy,
        "entropy/nucleus": old.nucleus_entropy,
        "entropy/nucleus_size": old.nucleus_size,
    }
    per_token = {
        **{name: value for name, value in entropies.items() if value is not None},
        "logprob/mean": old.logprob,
        "mismatch/mean": gap.abs(),
        "mismatch/ratio": (-gap).exp(),
    }
    if old.support_size is not None and old.outside_support is not None:
        recorded = torch.tensor([e.sample.support is not None for e in episodes], device=batch.reward.device)
        per_token |= {
            "support/size": old.support_size,
            "support/outside": old.outside_support,
            "support/recorded": batch.token(recorded),
        }
    sums = [torch.where(batch.mask, value.double(), 0.0).sum() for value in per_token.values()]
    sums += [value.double().sum().to(batch.reward.device) for value in {**per_sequence, **per_group}.values()]
    counts = [batch.mask.sum(), torch.tensor(len(episodes)), leaders.sum()]
    total = reduce.sum(torch.stack([x.double().to(batch.reward.device) for x in [*sums, *counts]])).tolist()
    *totals, tokens, sequences, groups = total
    divisors = [tokens] * len(per_token) + [sequences] * len(per_sequence) + [groups] * len(per_group)
    names = [*per_token, *per_sequence, *per_group]
    metrics = {n: x / max(d, 1) for n, x, d in zip(names, totals, divisors, strict=True)}
    for outcome in OF_FUNCTIONS:  # the verifier has none
        if not metrics[name := f"reward/outcome/{outcome.value}"]:
            del metrics[name]
    largest = gap.abs().max() if len(gap) else gap.sum()
    metrics["mismatch/max"] = float(reduce.concat(largest[None]).max())
    return metrics

"""One step's prompts -> judged episodes of this data-parallel rank.

The prompts of a mini-batch are dealt to the data-parallel ranks in equal contiguous shares. Within one copy
of the model its tensor- and pipeline-parallel ranks sample and judge a part each and exchange the episodes,
so that all of them train on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_ext.model import groups
from megatron_ext.rollout.base import Request, RolloutEngine, Sampling
from megatron_ext.rollout.rewards import RewardPool
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.train.config import Config
from megatron_ext.train.metrics import Watch
from megatron_ext.types import Episode, Problem

EncodedProblem = tuple[Problem, tuple[int, ...]]


def local_prompts(config: Config) -> list[int]:
    """Positions in the step of this rank's prompts: its share of the first mini-batch, of the second, ..."""
    share = config.train.mini_batch_prompts // config.parallel.data
    first = groups.data().rank() * share
    return [
        start + first + i
        for start in range(0, config.rollout.prompts, config.train.mini_batch_prompts)
        for i in range(share)
    ]


def collect(
    config: Config,
    engine: RolloutEngine,
    pool: RewardPool,
    problems: Sequence[EncodedProblem],
    *,
    step: int,
    watch: Watch,
) -> list[Episode]:
    """Sample and judge this data-parallel rank's responses, in order of prompt and sample.

    ``problems`` are all the prompts of the step. A response's seed depends on the run's seed, the step and its
    place in the step, not on the layout.
    """
    group = groups.model()
    rollout = config.rollout
    places = [(prompt, sample) for prompt in local_prompts(config) for sample in range(rollout.samples)]
    own = places[group.rank() :: group.size()]
    requests = [
        Request(problems[prompt][1], seed_of(config.train.seed, step, prompt, sample)) for prompt, sample in own
    ]
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_response_tokens)
    with watch.phase("rollout", total=len(own)) as phase:
        samples = engine.generate(
            requests,
            sampling,
            lambda done: phase.advance(len(done), tokens=group.size() * sum(len(s.response_ids) for s in done)),
        )
    with watch.phase("reward", total=len(own)) as phase:
        rewards = pool.score([(problems[prompt][0], s.text) for (prompt, _), s in zip(own, samples, strict=True)])
        phase.advance(len(own))
        episodes = {
            place: Episode(problems[place[0]][0], place[0], sample, reward)
            for place, sample, reward in zip(own, samples, rewards, strict=True)
        }
        parts: list[dict] = [{} for _ in range(group.size())]
        dist.all_gather_object(parts, episodes, group=group)
    everyone = {place: episode for part in parts for place, episode in part.items()}
    return [everyone[place] for place in places]

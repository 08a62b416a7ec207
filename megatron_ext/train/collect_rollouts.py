"""One step's prompts -> scored episodes of this data-parallel rank.

A prompt's index is its number in the step's order of data. To sample, prompts are dealt to the data-parallel ranks in
turn. The tensor-, context- and pipeline-parallel ranks that train together sample and score a part each and exchange
the episodes, so that all of them have the same ones.

To train, the whole groups of each mini-batch (the next ``train.mini_batch_prompts`` of them) are dealt anew: as many to
every data-parallel rank, and so that the one with the most tokens, for which all others wait, has few (``deal``). A
step's loss is a sum over tokens with weights fixed before, so who trains on which changes rounding only.

Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal has no advantage. It is dropped, and the
next prompts are sampled until ``rollout.prompts`` groups are left, in at most ``rollout.max_generations`` rounds. The
first takes ``rollout.oversample`` times the prompts, a later one as many as the share of useful groups so far makes
necessary. The step trains on the first useful groups in order of prompt index, so the choice depends on seeds and
rewards alone, not on the layout; those beyond the last one needed are lost, with their prompts. When the rounds are
used up, the step's first dropped groups fill the gap (DAPO's code ends the run there): they add tokens without an
advantage, and are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.distributed as dist

from megatron_ext.config.schema import Config, RolloutConfig
from megatron_ext.metrics.display import Watch
from megatron_ext.model import groups, parallel
from megatron_ext.rollout.base import Request, RolloutEngine, Sampling
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.rewards.verify import Outcome
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.types import Episode, Problem

EncodedProblem = tuple[Problem, tuple[int, ...]]
NextProblems = Callable[[int], Sequence[EncodedProblem]]  # the next so many problems in the order of the data
Verdict = Literal["useful", "right", "wrong"]  # right, wrong: rewards all equal


@dataclass(frozen=True)
class Rollouts:
    """Where the responses of step ``step`` (counted from 0) come from and who scores them."""

    config: Config
    engine: RolloutEngine
    pool: RewardPool | FunctionPool
    step: int
    watch: Watch

    def collect(self, next_problems: NextProblems) -> tuple[list[Episode], dict[str, float]]:
        """The episodes this data-parallel rank trains on, in order of prompt index and sample, and metrics.

        A response's seed depends on the run's seed, the step and its prompt index, not on the layout. Groups are
        numbered from 0 in the order of the whole step's batch.
        """
        rollout = self.config.rollout
        wanted = math.ceil(rollout.prompts * rollout.oversample) if rollout.dynamic_sampling else rollout.prompts
        episodes = self.generate(next_problems(wanted), first=0)
        chosen, metrics = list(range(wanted)), {}
        if rollout.dynamic_sampling:
            verdicts = share_verdicts(episodes)
            generations = 1
            while verdicts.count("useful") < rollout.prompts and generations < rollout.max_generations:
                more = self.generate(next_problems(num_to_take(verdicts, rollout.prompts)), first=len(verdicts))
                episodes |= more
                verdicts += share_verdicts(more)
                generations += 1
            chosen = choose(verdicts, rollout.prompts)
            metrics = {"dynamic/generations": float(generations)} | report(verdicts, rollout)
        own, imbalance = exchange(episodes, chosen, self.config.train.mini_batch_prompts)
        return own, metrics | {"data/imbalance": imbalance}

    def generate(self, problems: Sequence[EncodedProblem], *, first: int) -> dict[int, list[Episode]]:
        """``prompt_index -> group`` of this data-parallel rank's part of ``problems``, numbered from ``first``."""
        data, group, rollout = groups.data(), parallel.same_sequences(), self.config.rollout
        mine = [
            prompt_index
            for prompt_index in range(first, first + len(problems))
            if prompt_index % data.size() == data.rank()
        ]
        indices = [(prompt_index, sample) for prompt_index in mine for sample in range(rollout.samples)]
        own = indices[group.rank() :: group.size()]
        encoded = dict(enumerate(problems, first))
        seed = self.config.train.seed
        requests = [
            Request(encoded[prompt_index][1], seed_of(seed, self.step, prompt_index, sample))
            for prompt_index, sample in own
        ]
        sampling = Sampling(
            rollout.temperature,
            rollout.top_p,
            rollout.max_response_tokens,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            keeps_support=rollout.replays_sampling,
            routing=rollout.routing_replay,
        )
        with self.watch.phase("rollout", total=len(own)) as phase:
            samples = self.engine.generate(
                requests,
                sampling,
                lambda done: phase.advance(len(done), tokens=group.size() * sum(len(s.response_ids) for s in done)),
            )
        with self.watch.phase("reward", total=len(own)) as phase:
            answers = [
                (encoded[prompt_index][0], sample) for (prompt_index, _), sample in zip(own, samples, strict=True)
            ]
            rewards = self.pool.score_samples(answers)
            phase.advance(len(own))
            scored = {
                index: Episode(encoded[index[0]][0], index[0], sample, reward)
                for index, sample, reward in zip(own, samples, rewards, strict=True)
            }
            everyone = gathered(scored, group)
        return {
            prompt_index: [everyone[prompt_index, sample] for sample in range(rollout.samples)] for prompt_index in mine
        }


def verdict_of(group: Sequence[Episode]) -> Verdict:
    """Whether a group's rewards, NaN left out, differ; if not, whether its responses are right."""
    scored = [episode.reward for episode in group if not math.isnan(episode.reward.value)]
    if len({reward.value for reward in scored}) > 1:
        return "useful"
    return "right" if scored and scored[0].outcome == Outcome.CORRECT else "wrong"


def share_verdicts(own: dict[int, list[Episode]]) -> list[Verdict]:
    """The verdicts of one round's groups, all data-parallel ranks' together, in order of prompt index."""
    everyone = gathered({prompt_index: verdict_of(group) for prompt_index, group in own.items()}, groups.data())
    return [everyone[prompt_index] for prompt_index in sorted(everyone)]


def num_to_take(verdicts: Sequence[Verdict], wanted: int) -> int:
    """How many prompts should give the missing useful groups at the share so far, at most ``wanted``."""
    useful = verdicts.count("useful")
    return min(wanted, -(-(wanted - useful) * len(verdicts) // useful)) if useful else wanted


def choose(verdicts: Sequence[Verdict], wanted: int) -> list[int]:
    """The prompt indices of the first useful groups, then of the first others where those are too few, ascending."""
    by_use = sorted(range(len(verdicts)), key=lambda prompt_index: (verdicts[prompt_index] != "useful", prompt_index))
    return sorted(by_use[:wanted])


def deal(tokens: Sequence[int], holders: Sequence[int], mini_batch: int, num_ranks: int) -> list[int]:
    """Which rank trains on each group: of each mini-batch as many groups on every rank, and about as many tokens.

    The longest group first, to the rank with the fewest tokens that has room; of equals, to the one that holds it.
    """
    owners = [0] * len(tokens)
    for start in range(0, len(tokens), mini_batch):
        part = range(start, min(start + mini_batch, len(tokens)))
        load, room = [0] * num_ranks, [len(part) // num_ranks] * num_ranks
        for number in sorted(part, key=lambda number: (-tokens[number], number)):
            vacant = (rank for rank in range(num_ranks) if room[rank])
            owner = min(vacant, key=lambda rank: (load[rank], rank != holders[number], rank))
            owners[number] = owner
            load[owner] += tokens[number]
            room[owner] -= 1
    return owners


def imbalance(tokens: Sequence[int], owners: Sequence[int], mini_batch: int, num_ranks: int) -> float:
    """The largest rank's number of tokens over the mean of all, averaged over mini-batches: 1 is balance."""
    ratios = []
    for start in range(0, len(tokens), mini_batch):
        load = Counter(dict.fromkeys(range(num_ranks), 0))
        for number in range(start, min(start + mini_batch, len(tokens))):
            load[owners[number]] += tokens[number]
        ratios.append(max(load.values()) * num_ranks / load.total())
    return sum(ratios) / len(ratios)


def exchange(episodes: dict[int, list[Episode]], chosen: Sequence[int], mini_batch: int) -> tuple[list[Episode], float]:
    """This rank's share of the ``chosen`` groups, numbered anew from 0, and the share's ``imbalance``.

    Groups are whole on a rank.
    """
    data = groups.data()
    held = {number: episodes[prompt_index] for number, prompt_index in enumerate(chosen) if prompt_index in episodes}
    lengths = gathered({number: num_tokens(group) for number, group in held.items()}, data)
    tokens = [lengths[number] for number in range(len(chosen))]
    owners = deal(tokens, [prompt_index % data.size() for prompt_index in chosen], mini_batch, data.size())
    leaving: list[dict[int, list[Episode]]] = [{} for _ in range(data.size())]
    for number, group in held.items():
        leaving[owners[number]][number] = group
    own = {number: group for part in parallel.swap(leaving, data) for number, group in part.items()}
    dealt = [replace(episode, group=number) for number in sorted(own) for episode in own[number]]
    return dealt, imbalance(tokens, owners, mini_batch, data.size())


def num_tokens(group: Sequence[Episode]) -> int:
    """Prompts and responses: what a training pass reads."""
    return sum(len(episode.sample.prompt_ids) + len(episode.sample.response_ids) for episode in group)


def report(verdicts: Sequence[Verdict], rollout: RolloutConfig) -> dict[str, float]:
    """Shares of all the step's groups, and how many of the batch were dropped ones or were not needed."""
    counts = Counter(verdicts)
    return {
        "dynamic/kept_share": counts["useful"] / len(verdicts),
        "dynamic/all_right": counts["right"] / len(verdicts),
        "dynamic/all_wrong": counts["wrong"] / len(verdicts),
        "dynamic/filled": float(max(0, rollout.prompts - counts["useful"])),
        "dynamic/surplus": float(max(0, counts["useful"] - rollout.prompts)),
    }


def gathered(own: dict[Any, Any], group: dist.ProcessGroup) -> dict[Any, Any]:
    """The dictionaries of all ranks of ``group`` as one."""
    if group.size() == 1:
        return dict(own)
    parts: list[dict[Any, Any]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, own, group=parallel.gloo(group))
    return {key: value for part in parts for key, value in part.items()}

"""One step's prompts -> scored episodes of this data-parallel rank.

A prompt's index is its number in the step's order of data. To sample, prompts are dealt to the data-parallel ranks in
turn. The tensor-, context- and pipeline-parallel ranks that train together sample and score a part each and exchange
the episodes, so that all of them have the same ones.

To train, the whole groups of each mini-batch (the next ``train.mini_batch_prompts`` of them) are dealt to the
data-parallel ranks anew, so that the one with the most work, for which all others wait, has little (balance.py).

Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal has no advantage. It is dropped, and the
next prompts are sampled until ``rollout.prompts`` groups are left, in at most ``rollout.max_generations`` rounds. The
first takes ``rollout.oversample`` times the prompts, a later one as many as the share of useful groups so far makes
necessary. The step trains on the first useful groups in order of prompt index, so the choice depends on seeds and
rewards alone, not on the layout; those beyond the last one needed are lost, with their prompts, and generated no
further once that is known (early_stop.py). When the rounds are used up, the step's first dropped groups fill the gap
(DAPO's code ends the run there): they add tokens without an advantage, and are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from megatron_ext.config.schema import Config, RolloutConfig
from megatron_ext.model import groups, parallel
from megatron_ext.rollout.base import Request, RolloutEngine, Sampling
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.train.balance import deal, imbalance
from megatron_ext.train.early_stop import EarlyStop, Index, LookUp, Verdict, WholeRound, verdict_of
from megatron_ext.train.packing import num_read
from megatron_ext.train.sampled_batch import SampledBatch
from megatron_ext.train.timeline import Clock, meet
from megatron_ext.types import Episode, Problem, Sample

EncodedProblem = tuple[Problem, tuple[int, ...]]
NextProblems = Callable[[int], Sequence[EncodedProblem]]  # the next so many problems in the order of the data
Own = dict[Index, Episode]  # what this rank has sampled and scored


@dataclass(frozen=True)
class Rollouts:
    """Where the responses of step ``step`` (counted from 0) come from and who scores them."""

    config: Config
    engine: RolloutEngine
    pool: RewardPool | FunctionPool
    step: int
    watch: Clock
    replies: dict[Any, str] = field(default_factory=dict)  # of the pool, over all rounds: equal answers are scored once
    stop_group: dist.ProcessGroup | None = None  # of the exchanges that stop a round early; None: none is stopped
    dropped: list[int] = field(default_factory=list)  # responses of all ranks that each round has given up

    def collect(self, next_problems: NextProblems) -> SampledBatch:
        """The groups that train, with their metrics. Collective.

        A response's seed depends on the run's seed, the step and its prompt index, not on the layout.
        """
        return self.complete(self.sample(next_problems(self.num_first), first=0), next_problems)

    @property
    def num_first(self) -> int:
        """Prompts of the first round."""
        rollout = self.config.rollout
        return math.ceil(rollout.prompts * rollout.oversample) if rollout.dynamic_sampling else rollout.prompts

    def complete(self, first: Own, next_problems: NextProblems) -> SampledBatch:
        """``collect`` once the first round is there."""
        rollout = self.config.rollout
        episodes = self.share_groups(first)
        chosen, metrics = list(range(rollout.prompts)), {}
        if rollout.dynamic_sampling:
            verdicts, num_prompts = share_verdicts(episodes), self.num_first
            generations = 1
            while (found := verdicts.count("useful")) < rollout.prompts and generations < rollout.max_generations:
                problems = next_problems(num_to_take(verdicts, rollout.prompts))
                own = self.sample(problems, first=len(verdicts), wanted=rollout.prompts - found)
                more = self.share_groups(own)
                episodes |= more
                verdicts += share_verdicts(more)
                num_prompts += len(problems)
                generations += 1
            chosen = choose(verdicts, rollout.prompts)
            metrics = {"dynamic/generations": float(generations)} | report(verdicts, num_prompts, rollout)
        taken = {prompt_index: episodes[prompt_index] for prompt_index in chosen if prompt_index in episodes}
        return SampledBatch(self.step, chosen, taken, metrics, num_dropped=sum(self.dropped))

    def sample(self, problems: Sequence[EncodedProblem], *, first: int, wanted: int = 0) -> Own:
        """This rank's part of ``problems``, whose prompt indices begin with ``first``; of a round that stops when
        ``wanted`` groups are useful (0: those of a batch), what is needed of it.

        No collective but the engine's own and those of ``stop_group``: of an engine that can, in any thread.
        """
        rollout, encoded = self.config.rollout, dict(enumerate(problems, first))
        own = own_part(encoded, rollout.samples)
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
        with self.pool.scoring(len(own), self.replies) as scoring:
            stop = self.stop_of(scoring.look_up, len(own), len(problems), first, wanted or rollout.prompts)
            with stop.running(self._for_others):
                with self.watch.phase("rollout", total=len(own)) as phase:

                    def finished(done: Mapping[int, Sample]) -> None:
                        pairs = {own[number]: (encoded[own[number][0]][0], each) for number, each in done.items()}
                        scoring.submit(pairs.values())
                        stop.finished(pairs)
                        tokens = sum(len(sample.response_ids) for sample in done.values())
                        phase.advance(len(done), tokens=parallel.same_sequences().size() * tokens)

                    generate: Any = self.engine.generate  # takes one more argument where the engine can stop early
                    stops = isinstance(stop, EarlyStop)
                    is_needed = (lambda number: stop.is_needed(own[number][0]),) if stops else ()
                    samples = generate(requests, sampling, finished, *is_needed)
                with self.watch.phase("reward", total=len(own)) as phase:
                    sampled = {
                        index: (encoded[index[0]][0], sample)
                        for index, sample in zip(own, samples, strict=True)
                        if stop.is_needed(index[0])
                    }
                    rewards = scoring.score_samples(list(sampled.values()))
                    phase.advance(len(own))
        self.dropped.append(stop.num_dropped)
        return {
            index: Episode(problem, index[0], sample, reward)
            for (index, (problem, sample)), reward in zip(sampled.items(), rewards, strict=True)
            if stop.is_needed(index[0])
        }

    def stop_of(self, look_up: LookUp, num_own: int, num_prompts: int, first: int, wanted: int) -> WholeRound:
        """When a round of ``num_prompts`` stops."""
        rollout = self.config.rollout
        if self.stop_group is None or not rollout.dynamic_sampling or num_prompts <= wanted:
            return WholeRound()
        samples = rollout.samples
        return EarlyStop(self.stop_group, look_up, first=first, samples=samples, wanted=wanted, num_own=num_own)

    @contextmanager
    def _for_others(self) -> Iterator[None]:
        """This rank has its responses, and waits for other ranks'."""
        with self.watch.phase("rollout"), self.watch.waiting():
            yield

    def share_groups(self, own: Own) -> dict[int, list[Episode]]:
        """``prompt index -> group``: what the ranks that train together have sampled."""
        with self.watch.phase("rollout"):  # of the slowest rank
            meet(self.watch)
        with self.watch.phase("reward"):
            everyone = gathered(own, parallel.same_sequences())
        indices = sorted({prompt_index for prompt_index, _ in everyone})
        samples = range(self.config.rollout.samples)
        return {prompt_index: [everyone[prompt_index, sample] for sample in samples] for prompt_index in indices}


def own_part(prompt_indices: Iterable[int], samples: int) -> list[Index]:
    """What this rank samples."""
    data, group = groups.data(), parallel.same_sequences()
    mine = (prompt_index for prompt_index in prompt_indices if prompt_index % data.size() == data.rank())
    return [(prompt_index, sample) for prompt_index in mine for sample in range(samples)][group.rank() :: group.size()]


def share_verdicts(own: dict[int, list[Episode]]) -> list[Verdict]:
    """The verdicts of one round's groups, all data-parallel ranks' together, in order of prompt index."""
    verdicts = {index: verdict_of([episode.reward for episode in group]) for index, group in own.items()}
    everyone = gathered(verdicts, groups.data())
    return [everyone[prompt_index] for prompt_index in sorted(everyone)]


def num_to_take(verdicts: Sequence[Verdict], wanted: int) -> int:
    """How many prompts should give the missing useful groups at the share so far, at most ``wanted``."""
    useful = verdicts.count("useful")
    return min(wanted, -(-(wanted - useful) * len(verdicts) // useful)) if useful else wanted


def choose(verdicts: Sequence[Verdict], wanted: int) -> list[int]:
    """The prompt indices of the first useful groups, then of the first others where those are too few, ascending."""
    by_use = sorted(range(len(verdicts)), key=lambda prompt_index: (verdicts[prompt_index] != "useful", prompt_index))
    return sorted(by_use[:wanted])


def exchange(batch: SampledBatch, mini_batch: int, *, cost: Callable[[int], int]) -> tuple[list[Episode], float]:
    """This rank's share of the batch, in order of group and sample, and the ``imbalance`` of all shares. Collective.

    Groups are whole on a rank, every rank has some of each mini-batch, and they are numbered from 0 in the order of the
    whole batch. ``cost``: of a sequence of so many tokens (balance.py::sequence_cost).
    """
    data, chosen = groups.data(), batch.chosen
    held = {number: batch.groups[index] for number, index in enumerate(chosen) if index in batch.groups}
    everyone = gathered({number: work(group, cost) for number, group in held.items()}, data)
    costs = [everyone[number] for number in range(len(chosen))]
    owners = deal(costs, mini_batch, data.size(), first=batch.step)
    leaving: list[dict[int, list[Episode]]] = [{} for _ in range(data.size())]
    for number, group in held.items():
        leaving[owners[number]][number] = group
    own = {number: group for part in parallel.swap(leaving, data) for number, group in part.items()}
    dealt = [replace(episode, group=number) for number in sorted(own) for episode in own[number]]
    return dealt, imbalance(costs, owners, mini_batch, data.size())


def work(group: Sequence[Episode], cost: Callable[[int], int]) -> int:
    """What a training pass costs that reads the prompts and responses of a group."""
    return sum(cost(num_read((episode.sample.prompt_ids, episode.sample.response_ids))) for episode in group)


def report(verdicts: Sequence[Verdict], num_prompts: int, rollout: RolloutConfig) -> dict[str, float]:
    """Shares of the step's groups up to the last one needed, how many of the batch were dropped ones, and how many of
    the ``num_prompts`` that were begun were not needed: the same wherever a round was stopped."""
    useful = [number for number, verdict in enumerate(verdicts) if verdict == "useful"]
    needed = verdicts[: useful[rollout.prompts - 1] + 1] if len(useful) >= rollout.prompts else verdicts
    counts = Counter(needed)
    return {
        "dynamic/kept_share": counts["useful"] / len(needed),
        "dynamic/all_right": counts["right"] / len(needed),
        "dynamic/all_wrong": counts["wrong"] / len(needed),
        "dynamic/filled": float(rollout.prompts - counts["useful"]),
        "dynamic/surplus": float(num_prompts - len(needed)),
    }


def gathered(own: dict[Any, Any], group: dist.ProcessGroup) -> dict[Any, Any]:
    """The dictionaries of all ranks of ``group`` as one."""
    if group.size() == 1:
        return dict(own)
    parts: list[dict[Any, Any]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, own, group=parallel.gloo(group))
    return {key: value for part in parts for key, value in part.items()}

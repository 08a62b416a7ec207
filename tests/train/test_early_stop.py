"""A round of dynamic sampling stops when its batch is known; the batch is that of a round which runs to its end."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.config.schema import Config, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.data.sampler import DataOrder
from megatron_ext.metrics.display import Watch
from megatron_ext.model import parallel
from megatron_ext.rollout.base import IsNeeded, OnBatch, Request, RolloutError, Sampling, unfinished
from megatron_ext.train.collect_rollouts import Rollouts, exchange
from megatron_ext.train.early_stop import EarlyStop
from megatron_ext.types import Problem, Reward, Sample
from tests import gloo
from tests.train import whole_run
from tests.train.test_collect_rollouts import Pool, summary

PROMPTS, SAMPLES, OVERSAMPLE, NUM_PROBLEMS = 8, 4, 9.0, 80
BEGUN = round(PROMPTS * OVERSAMPLE)
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]  # world, tensor
PATIENCE_S = 30.0


class SleepingEngine:
    """A response is its seed. It answers three of four requests, in a scrambled order, and sleeps over the last ones as
    long as they are needed: for ever, in the eyes of a test."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_batch: OnBatch | None = None,
        is_needed: IsNeeded | None = None,
    ) -> list[Sample]:
        answers = {n: Sample(r.prompt_ids, (1, 1), (0.0,) * 2, str(r.seed), False, 0) for n, r in enumerate(requests)}
        early = list(range(len(requests) * 3 // 4 if is_needed else len(requests)))
        random.Random(len(requests)).shuffle(early)
        for number in early:
            if on_batch is not None:
                on_batch({number: answers[number]})
        end = time.monotonic() + PATIENCE_S
        while is_needed and any(map(is_needed, set(answers) - set(early))) and time.monotonic() < end:
            time.sleep(0.01)
        return [answers[n] if n in early else unfinished(request, 0) for n, request in enumerate(requests)]


class FailingEngine:
    """One of its ranks fails while the other waits for it."""

    def generate(self, *_: Any) -> list[Sample]:
        if dist.get_rank() == 1:
            time.sleep(0.5)  # the ranks have begun to tell each other
            raise RolloutError("the engine of rank 1 fails")
        dist.barrier()
        return []


class LatePool(Pool):
    """Knows a reward only when it is asked for the third time."""

    def __init__(self, everything: float | None) -> None:
        super().__init__(everything)
        self.asked: dict[str, int] = {}

    @contextlib.contextmanager
    def scoring(self, num_answers: int, replies: dict[Any, str]) -> Iterator[Pool]:
        yield self

    def submit(self, samples: Any) -> None:
        self.asked |= {sample.text: 0 for _, sample in samples}

    def look_up(self, problem: Problem, sample: Sample) -> Reward | None:
        self.asked[sample.text] += 1
        return super().look_up(problem, sample) if self.asked[sample.text] >= 3 else None


def collected(
    rank: int, world: int, tensor: int, stops: bool, engine: Any = None
) -> tuple[Any, dict[str, float], int, list[int]]:
    """This rank's episodes, the batch's metrics, how many responses were given up, and the problems that come next."""
    rollout = RolloutConfig(prompts=PROMPTS, samples=SAMPLES, dynamic_sampling=True, oversample=OVERSAMPLE)
    config = Config(
        parallel=ParallelConfig(ranks_per_node=world, tensor=tensor),
        rollout=rollout,
        train=TrainConfig(mini_batch_prompts=PROMPTS, seed=11),
    )
    cpu_compat.enter()
    parallel.initialize(config.parallel)
    order = DataOrder([range(NUM_PROBLEMS)], seed=11)
    group = parallel.new_gloo() if stops else None
    parts: Any = (config, engine or SleepingEngine(), LatePool(None), 0, Watch(1, show=False))
    batch = Rollouts(*parts, stop_group=group).collect(
        lambda count: [(Problem(str(i), "", ""), (i,)) for i in order.take(count, step=0)]
    )
    episodes, _ = exchange(batch, PROMPTS, cost=lambda n: n)
    return summary(episodes), batch.metrics, batch.num_dropped, order.take(5, step=1)


@pytest.fixture(scope="module")
def whole() -> Any:
    [(episodes, metrics, dropped, after)] = gloo.run(collected, 1, 1, False)
    assert dropped == 0 and metrics["dynamic/generations"] == 1 and metrics["dynamic/filled"] == 0
    assert metrics["dynamic/surplus"] > BEGUN / 4  # all that the engine sleeps over
    return sorted(episodes), metrics, after


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_batch_is_that_of_a_round_that_runs_to_its_end(layout: tuple[int, int], whole: Any) -> None:
    world, tensor = layout
    start = time.monotonic()
    results = gloo.run(collected, world, tensor, True)
    assert time.monotonic() - start < PATIENCE_S
    assert sorted(e for result in results[::tensor] for e in result[0]) == whole[0]
    for _, metrics, dropped, after in results:
        assert metrics == whole[1] and after == whole[2]
        assert dropped == BEGUN * SAMPLES // 4


def test_a_rank_that_fails_while_others_wait_for_it_ends_and_says_why() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="the engine of rank 1 fails"):
        gloo.run(collected, 2, 1, True, FailingEngine())
    assert time.monotonic() - start < PATIENCE_S


def one_by_one(rank: int, world: int) -> list[tuple[float, bool]]:
    """Where a round of six prompts, of which two are wanted, ends after each group that is known."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    rewards = {0: (1.0, 0.0), 1: (1.0, 1.0), 2: (0.0, 1.0), 3: (0.0, 1.0), 4: (0.0, 0.0), 5: (0.0, 1.0)}

    def look_up(problem: Problem, sample: Sample) -> Reward:
        return Reward(float(sample.text), "correct" if sample.text == "1.0" else "wrong")

    stop = EarlyStop(parallel.new_gloo(), look_up, first=10, samples=2, wanted=2, num_own=12)
    found = []
    for prompt in (5, 3, 0, 2, 1, 4):  # the useful groups 5 and 3 are finished first, and are not the first useful ones
        responses = {i: Sample((1,), (1,), (0.0,), str(value), False, 0) for i, value in enumerate(rewards[prompt])}
        stop.finished({(10 + prompt, i): (Problem("", "", ""), sample) for i, sample in responses.items()})
        assert stop._exchange(is_over=False) is False
        found.append((stop._end, stop.is_needed(12)))
    assert stop._exchange(is_over=True) and stop.num_dropped == 0
    return found


def test_it_waits_for_the_first_useful_groups_not_for_any() -> None:
    """0 and 2 are: known once 1 is, the last of the prompts up to 2."""
    [found] = gloo.run(one_by_one, 1)
    assert found == [(float("inf"), True)] * 4 + [(13, True)] * 2


def test_a_run_that_stops_rounds_early_is_killed_and_goes_on(tmp_path: Path) -> None:
    options = ("rollout.dynamic_sampling=true", "rollout.oversample=3", "rollout.batch_size=8", "train.steps=3")
    recipe = "clip_higher/clip_higher-tiny-cpu.toml"
    assert whole_run.train(tmp_path / "whole", recipe, *options, world=2) == 0
    whole_run.train_and_die(tmp_path / "killed", recipe, *options, after=2, world=2)
    assert whole_run.train(tmp_path / "killed", recipe, *options, world=2) == 0
    assert all(step["speed/dropped_responses"] >= 0 for step in whole_run.steps(tmp_path / "whole"))
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 3) == whole_run.contents(tmp_path / "whole", 3)

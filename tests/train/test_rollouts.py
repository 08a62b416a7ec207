"""Dynamic sampling: which groups train depends on seeds and rewards, not on the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.train import parallel
from megatron_ext.train.config import Config, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.train.metrics import Watch
from megatron_ext.train.order import DataOrder
from megatron_ext.train.rollouts import Rollouts, choose, deal, num_to_draw, verdict_of
from megatron_ext.types import Episode, Problem, Reward, Sample
from tests import gloo

PROMPTS, SAMPLES, MINI, NUM_PROBLEMS = 8, 4, 4, 40
LAYOUTS = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 4), (4, 2, 2)]  # world, tensor, data


class Engine:
    """A response is its seed."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: Callable[[list[Sample]], None] | None = None
    ) -> list[Sample]:
        return [Sample(r.prompt_ids, (1,), (0.0,), str(r.seed), False, 0) for r in requests]


class Pool:
    """Every third problem is always solved, every third never, the others by chance; 0: never, 1: always."""

    def __init__(self, everything: float | None) -> None:
        self.everything = everything

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
        return [self.reward(int(problem.problem_id), int(text)) for problem, text in answers]

    def reward(self, number: int, seed: int) -> Reward:
        value = (1.0, 0.0, float(seed % 2))[number % 3] if self.everything is None else self.everything
        return Reward(value, "correct" if value else "wrong")


def collected(
    rank: int, world: int, tensor: int, everything: float | None, rounds: int, dynamic: bool, oversample: float = 1.0
) -> tuple[list[Episode], dict[str, float], list[int]]:
    """Two steps' episodes of this rank, the last step's metrics, and the problems that a third step would take."""
    config = Config(
        parallel=ParallelConfig(ranks_per_node=world, tensor=tensor),
        rollout=RolloutConfig(
            prompts=PROMPTS,
            samples=SAMPLES,
            dynamic_sampling=dynamic,
            oversample=oversample,
            max_generations=rounds,
        ),
        train=TrainConfig(mini_batch_prompts=MINI, seed=11),
    )
    parallel.initialize(config.parallel)
    order = DataOrder([range(NUM_PROBLEMS)], seed=11)
    episodes, metrics = [], {}
    for step in range(2):

        def draw(count: int, step: int = step) -> list[tuple[Problem, tuple[int, ...]]]:
            return [(Problem(str(i), "", ""), (i,)) for i in order.take(count, step=step)]

        rollouts: Any = Rollouts(config, Engine(), Pool(everything), step, Watch(1, show=False))  # type: ignore[arg-type]
        found, metrics = rollouts.collect(draw)
        episodes += found
    return episodes, metrics, order.take(5, step=2)


def summary(episodes: list[Episode]) -> list[tuple[int, str, str, float]]:
    return [(e.group, e.problem.problem_id, e.sample.text, e.reward.value) for e in episodes]


def trained(layout: tuple, everything: float | None = None, rounds: int = 10, dynamic: bool = True) -> Any:
    """All ranks' episodes of each mini-batch in order of group; metrics and next problems, equal on all ranks."""
    world, tensor, data = layout
    results = gloo.run(collected, world, tensor, everything, rounds, dynamic)
    assert all(result[1:] == results[0][1:] for result in results)
    copies = [summary(episodes) for episodes, _, _ in results]
    assert all(copies.count(copy) == tensor for copy in copies)  # the ranks of a model copy train on the same
    minis: list[list[tuple]] = [[] for _ in range(2 * PROMPTS // MINI)]
    for copy in dict.fromkeys(map(tuple, copies)):
        share = MINI // data * SAMPLES
        assert len(copy) == share * len(minis)
        for mini, episodes in enumerate(minis):
            episodes += copy[mini * share : (mini + 1) * share]
    return [sorted(episodes, key=lambda e: e[0]) for episodes in minis], results[0][1], results[0][2]


@pytest.fixture(scope="module")
def one_rank() -> Any:
    return trained(LAYOUTS[0])


def test_every_group_that_trains_has_an_advantage(one_rank: Any) -> None:
    minis, metrics, _ = one_rank
    for mini in minis:
        rewards = [[e[3] for e in mini if e[0] == group] for group in dict.fromkeys(e[0] for e in mini)]
        assert [len(r) for r in rewards] == [SAMPLES] * MINI
        assert all(len(set(r)) == 2 for r in rewards)
    assert [e[0] for e in minis[0] + minis[1]] == [group for group in range(PROMPTS) for _ in range(SAMPLES)]
    assert metrics["dynamic/generations"] > 1 and metrics["dynamic/filled"] == 0
    assert 0.1 < metrics["dynamic/kept_share"] < 0.5
    shares = [metrics[f"dynamic/{name}"] for name in ("kept_share", "all_right", "all_wrong")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_which_groups_train_does_not_depend_on_the_layout(layout: tuple, one_rank: Any) -> None:
    assert trained(layout) == one_rank


def test_oversampling_draws_more_at_first_and_trains_on_as_many(one_rank: Any) -> None:
    [(episodes, metrics, _)] = gloo.run(collected, 1, 1, None, 10, True, 6.0)
    assert metrics["dynamic/generations"] == 1 < one_rank[1]["dynamic/generations"]
    assert len(episodes) == 2 * PROMPTS * SAMPLES and metrics["dynamic/surplus"] > 0


@pytest.mark.parametrize("layout", LAYOUTS[1:4], ids=str)
def test_without_it_every_prompt_of_the_step_trains(layout: tuple) -> None:
    minis, metrics, _ = trained(layout, dynamic=False)
    assert metrics == {} and trained(LAYOUTS[0], dynamic=False)[0] == minis
    drawn = [e[1] for mini in minis for e in mini][::SAMPLES]
    assert drawn == [str(i) for i in DataOrder([range(NUM_PROBLEMS)], seed=11).take(2 * PROMPTS, step=0)]


@pytest.mark.parametrize(("everything", "name"), [(1.0, "all_right"), (0.0, "all_wrong")])
def test_at_the_limit_the_first_dropped_groups_fill_the_batch(everything: float, name: str) -> None:
    minis, metrics, after = trained(LAYOUTS[1], everything=everything, rounds=3)
    expected = {
        "kept_share": 0.0,
        "all_right": 0.0,
        "all_wrong": 0.0,
        "filled": 8.0,
        "surplus": 0.0,
        "generations": 3.0,
    }
    assert metrics == {f"dynamic/{key}": value for key, value in (expected | {name: 1.0}).items()}
    order = DataOrder([range(NUM_PROBLEMS)], seed=11)
    first, second = order.take(3 * PROMPTS, step=0), order.take(3 * PROMPTS, step=1)
    taken = [int(e[1]) for mini in minis for e in mini][::SAMPLES]
    assert taken == first[:PROMPTS] + second[:PROMPTS] and after == order.take(5, step=2)


def test_a_gap_is_filled_and_useful_groups_come_first() -> None:
    verdicts: Any = ["right", "useful", "wrong", "useful", "right"]
    assert choose(verdicts, 2) == [1, 3]
    assert choose(verdicts, 4) == [0, 1, 2, 3]
    assert choose(verdicts, 1) == [1]


def test_a_round_draws_what_the_share_so_far_makes_necessary() -> None:
    few: Any = ["useful", "wrong", "wrong", "right"]
    assert num_to_draw(few, 4) == 4  # 3 missing at 1/4: 12, at most a whole batch
    assert num_to_draw(few[:2] * 2, 3) == 2  # 1 missing at 1/2
    assert num_to_draw(few[1:], 4) == 4


def test_groups_move_only_where_they_must() -> None:
    assert deal([0, 1, 0, 1], 4, 2) == [0, 1, 0, 1]
    assert deal([0, 0, 0, 1], 4, 2) == [0, 0, 1, 1]
    assert deal([1, 1, 0, 0], 2, 2) == [1, 0, 0, 1]  # two mini-batches
    assert deal([2, 2, 2, 2, 2, 0], 6, 3) == [2, 2, 0, 1, 1, 0]


def test_a_reward_that_is_none_does_not_make_a_group_useful() -> None:
    def group(*values: float) -> list[Episode]:
        sample = Sample((1,), (1,), (0.0,), "", False, 0)
        return [Episode(Problem("", "", ""), 0, sample, Reward(v, "correct" if v > 0 else "wrong")) for v in values]

    nan = float("nan")
    found = [verdict_of(group(*values)) for values in ((1, 0), (1, nan), (0, nan), (nan, nan), (nan, 1, 0))]
    assert found == ["useful", "right", "wrong", "wrong", "useful"]

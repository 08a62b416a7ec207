"""Dynamic sampling: which groups train depends on seeds and rewards, not on the layout."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.config.schema import Config, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.data.sampler import DataOrder
from megatron_ext.metrics.display import Watch
from megatron_ext.model import hf_weights, parallel
from megatron_ext.rollout.base import OnBatch, Request, Sampling
from megatron_ext.train.balance import deal, sequence_cost
from megatron_ext.train.collect_rollouts import Rollouts, choose, exchange, num_to_take, work
from megatron_ext.train.early_stop import verdict_of
from megatron_ext.types import Episode, Problem, Reward, Sample
from tests import gloo, tiny
from tests.train.test_invariance import gathered_gradients, worst
from tests.train.test_passes import learner_of

PROMPTS, SAMPLES, MINI, NUM_PROBLEMS = 8, 4, 4, 40
LAYOUTS = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 4), (4, 2, 2)]  # world, tensor, data


class Engine:
    """A response is its seed, and now and then a long one."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch | None = None
    ) -> list[Sample]:
        lengths = [2 ** (r.seed % 9) for r in requests]
        return [
            Sample(r.prompt_ids, (1,) * n, (0.0,) * n, str(r.seed), False, 0)
            for r, n in zip(requests, lengths, strict=True)
        ]


class Pool:
    """Every third problem is always solved, every third never, the others by chance; 0: never, 1: always."""

    def __init__(self, everything: float | None) -> None:
        self.everything = everything

    @contextlib.contextmanager
    def scoring(self, num_answers: int, replies: dict[Any, str]) -> Iterator[Pool]:
        yield self

    def look_up(self, problem: Problem, sample: Sample) -> Reward | None:
        return self.reward(int(problem.problem_id), int(sample.text))

    def score_samples(self, samples: Sequence[tuple[Problem, Sample]]) -> list[Reward]:
        return [self.reward(int(problem.problem_id), int(sample.text)) for problem, sample in samples]

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
    cpu_compat.enter()
    parallel.initialize(config.parallel)
    order = DataOrder([range(NUM_PROBLEMS)], seed=11)
    episodes, metrics = [], {}
    for step in range(2):

        def next_problems(count: int, step: int = step) -> list[tuple[Problem, tuple[int, ...]]]:
            return [(Problem(str(i), "", ""), (i,)) for i in order.take(count, step=step)]

        rollouts: Any = Rollouts(config, Engine(), Pool(everything), step, Watch(1, show=False))  # type: ignore[arg-type]
        batch = rollouts.collect(next_problems)
        found, balance = exchange(batch, MINI, cost=lambda n: n)
        episodes, metrics = episodes + found, batch.metrics | {"data/imbalance": balance}
    return episodes, metrics, order.take(5, step=2)


def summary(episodes: list[Episode]) -> list[tuple[int, str, str, float]]:
    return [(e.group, e.problem.problem_id, e.sample.text, e.reward.value) for e in episodes]


def steps_of(numbers: Sequence[int]) -> list[int]:
    """The step of each episode: where one begins, the numbers of a rank's groups fall, as it has some of each half."""
    return list(itertools.accumulate(int(b < a) for a, b in itertools.pairwise([numbers[0], *numbers])))


def trained(layout: tuple, everything: float | None = None, rounds: int = 10, dynamic: bool = True) -> Any:
    """All ranks' episodes of each mini-batch in order of group; metrics and next problems, equal on all ranks.

    Without the imbalance, which alone depends on the layout.
    """
    world, tensor, data = layout
    results = gloo.run(collected, world, tensor, everything, rounds, dynamic)
    assert all(result[1:] == results[0][1:] for result in results)
    copies = [summary(episodes) for episodes, _, _ in results]
    assert all(copies.count(copy) == tensor for copy in copies)  # the ranks of a model copy train on the same
    mini_batches: list[list[tuple]] = [[] for _ in range(2 * PROMPTS // MINI)]
    for copy in dict.fromkeys(map(tuple, copies)):
        numbers = [e[0] for e in copy]
        own = Counter((n + PROMPTS * step) // MINI for n, step in zip(numbers, steps_of(numbers), strict=True))
        assert own.keys() == set(range(len(mini_batches))) and not any(count % SAMPLES for count in own.values())
        parts = iter(copy)
        for mini_batch, count in sorted(own.items()):
            mini_batches[mini_batch] += itertools.islice(parts, count)
    assert data == len(set(map(tuple, copies))) and results[0][1].pop("data/imbalance") >= 1
    return [sorted(episodes, key=lambda e: e[0]) for episodes in mini_batches], results[0][1], results[0][2]


@pytest.fixture(scope="module")
def one_rank() -> Any:
    return trained(LAYOUTS[0])


def test_every_group_that_trains_has_an_advantage(one_rank: Any) -> None:
    mini_batches, metrics, _ = one_rank
    for mini_batch in mini_batches:
        rewards = [[e[3] for e in mini_batch if e[0] == group] for group in dict.fromkeys(e[0] for e in mini_batch)]
        assert [len(r) for r in rewards] == [SAMPLES] * MINI
        assert all(len(set(r)) == 2 for r in rewards)
    assert [e[0] for e in mini_batches[0] + mini_batches[1]] == [
        group for group in range(PROMPTS) for _ in range(SAMPLES)
    ]
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
    mini_batches, metrics, _ = trained(layout, dynamic=False)
    assert metrics == {} and trained(LAYOUTS[0], dynamic=False)[0] == mini_batches
    taken = [e[1] for mini_batch in mini_batches for e in mini_batch][::SAMPLES]
    assert taken == [str(i) for i in DataOrder([range(NUM_PROBLEMS)], seed=11).take(2 * PROMPTS, step=0)]


@pytest.mark.parametrize(("everything", "name"), [(1.0, "all_right"), (0.0, "all_wrong")])
def test_at_the_limit_the_first_dropped_groups_fill_the_batch(everything: float, name: str) -> None:
    mini_batches, metrics, after = trained(LAYOUTS[1], everything=everything, rounds=3)
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
    taken = [int(e[1]) for mini_batch in mini_batches for e in mini_batch][::SAMPLES]
    assert taken == first[:PROMPTS] + second[:PROMPTS] and after == order.take(5, step=2)


def test_a_gap_is_filled_and_useful_groups_come_first() -> None:
    verdicts: Any = ["right", "useful", "wrong", "useful", "right"]
    assert choose(verdicts, 2) == [1, 3]
    assert choose(verdicts, 4) == [0, 1, 2, 3]
    assert choose(verdicts, 1) == [1]


def test_a_round_draws_what_the_share_so_far_makes_necessary() -> None:
    few: Any = ["useful", "wrong", "wrong", "right"]
    assert num_to_take(few, 4) == 4  # 3 missing at 1/4: 12, at most a whole batch
    assert num_to_take(few[:2] * 2, 3) == 2  # 1 missing at 1/2
    assert num_to_take(few[1:], 4) == 4


def test_ranks_are_balanced_after_sampling() -> None:
    """What is reported is what the ranks got."""
    results = gloo.run(collected, 4, 1, None, 10, False)
    loads = [[0, 0] for _ in results]  # of the last step's mini-batches
    for load, (episodes, _, _) in zip(loads, results, strict=True):
        for step, episode in zip(steps_of([e.group for e in episodes]), episodes, strict=True):
            load[episode.group // MINI] += work([episode], lambda n: n) if step else 0
    ratios = [max(mini_batch) * 4 / sum(mini_batch) for mini_batch in zip(*loads, strict=True)]
    assert results[0][1]["data/imbalance"] == pytest.approx(sum(ratios) / 2)


def gradients_of_shares(rank: int, world: int, path: str, method: dict, mini_batch: int) -> list[dict[str, Tensor]]:
    """The gradient of a step's last update: dealt to the ranks in turn, for balance, and one group against the rest."""
    learner, everything = learner_of(path, world, method, {"ranks_per_node": 2}, mini_batch), tiny.episodes()
    cost = sequence_cost(learner.policy.architecture)
    costs = [work([e for e in everything if e.group == group], cost) for group in range(4)]
    found = []
    for owners in (
        [0, 1, 0, 1],
        deal(costs, mini_batch, 2, first=0),
        [0, 1, 1, 1] if mini_batch == 4 else [1, 0, 0, 1],
    ):
        learner.method.load_state_dict(methods.create(method).state_dict())
        learner.actor.update = lambda max_bad_steps: (1.0, 0.0)  # type: ignore[method-assign]
        learner.step([e for e in everything if owners[e.group] == rank], Watch(1, show=False))
        whole = hf_weights.stream(learner.policy, gathered_gradients(learner.policy))
        found.append({name: gradient.clone() for name, gradient in whole})
    return found


@pytest.mark.parametrize("mini_batch", [4, 2])
@pytest.mark.parametrize("method", [{"name": "siren", "coef": 0.7}, {"name": "forking_tokens"}], ids=str)
def test_who_trains_on_a_group_changes_no_gradient(method: dict, mini_batch: int) -> None:
    """To the rounding of fp32, as between layouts (test_invariance.py)."""
    for plain, *others in gloo.run(gradients_of_shares, 2, str(tiny.hf_model()[1]), method, mini_batch):
        assert all(gradient.any() for gradient in plain.values())
        assert all(worst(other, plain) < 1e-5 for other in others)


def test_a_reward_that_is_none_does_not_make_a_group_useful() -> None:
    def group(*values: float) -> list[Episode]:
        sample = Sample((1,), (1,), (0.0,), "", False, 0)
        return [Episode(Problem("", "", ""), 0, sample, Reward(v, "correct" if v > 0 else "wrong")) for v in values]

    nan = float("nan")
    found = [
        verdict_of([each.reward for each in group(*values)])
        for values in ((1, 0), (1, nan), (0, nan), (nan, nan), (nan, 1, 0))
    ]
    assert found == ["useful", "right", "wrong", "wrong", "useful"]

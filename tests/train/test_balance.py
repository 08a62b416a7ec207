"""The rule of the longest processing time, worked out by hand, and what it leaves to wait for."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from megatron_ext.config.checks import read_hf_config
from megatron_ext.model.architectures import read_architecture
from megatron_ext.train.balance import deal, imbalance, least_longest, loads, longest_first, sequence_cost

MODELS = Path(__file__).parents[2] / "recipes" / "models"


def test_the_costliest_come_first_and_each_goes_to_the_lightest() -> None:
    """7 and 6 open the bins; 5 goes beside 6 (11), 4 beside 7 (11), 3 to the first of equals (14), 2 to the other."""
    assert longest_first([7, 6, 5, 4, 3, 2], 2) == [0, 1, 1, 0, 0, 1]
    assert longest_first([2, 3, 4, 5, 6, 7], 2) == [1, 0, 0, 1, 1, 0]
    assert longest_first([1, 1, 1], 3) == [0, 1, 2]
    assert sorted(longest_first([5], 3)) == [0]


def test_the_worst_case_of_the_rule_is_its_bound() -> None:
    """Of 3, 3, 2, 2, 2 in two bins: 7, where 3 + 3 and 2 + 2 + 2 would be 6: 4/3 - 1/6."""
    costs = [3, 3, 2, 2, 2]
    assert sorted(loads(costs, longest_first(costs, 2), 2)) == [5, 7]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_rule_is_near_the_best_there_is(num_ranks: int) -> None:
    """Against all divisions of seven items, and never below the bound that any division has."""
    for seed in range(20):
        costs = skewed(seed, 7, samples=1)
        best = min(max(loads(costs, owners, num_ranks)) for owners in itertools.product(range(num_ranks), repeat=7))
        found = max(loads(costs, longest_first(costs, num_ranks), num_ranks))
        assert least_longest(costs, num_ranks) <= best <= found <= best * (4 / 3 - 1 / (3 * num_ranks))


def test_bounds_by_hand() -> None:
    assert least_longest([3, 3, 2, 2, 2], 2) == 6  # the mean
    assert least_longest([9, 1, 1, 1], 2) == 9  # the costliest
    assert least_longest([5, 5, 5], 2) == 10  # two of three share a rank
    assert least_longest([4], 2) == 4


def test_every_mini_batch_is_divided_and_the_heavy_shares_take_turns() -> None:
    """The rank with the first mini-batch's 9 gets the three ones of the second."""
    assert deal([9, 1, 1, 1, 9, 1, 1, 1], 4, 2, first=0) == [0, 1, 1, 1, 1, 0, 0, 0]
    assert deal([9, 1, 1, 9], 2, 2, first=0) == [0, 1, 0, 1]  # 9 and 1, then 1 to where 9 is and 9 to where 1 is
    assert deal([5, 5, 5, 5], 4, 1, first=3) == [0, 0, 0, 0]


def test_another_rank_has_the_heaviest_share_in_every_step() -> None:
    assert [deal([9, 5, 1], 3, 3, first=step) for step in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_no_rank_is_left_without_groups() -> None:
    for seed in range(20):
        costs = skewed(seed, 24)
        owners = deal(costs, 8, 8, first=seed)
        assert all(sorted(owners[start : start + 8]) == list(range(8)) for start in range(0, 24, 8))


def test_imbalance_by_hand() -> None:
    """9 and 3 over their mean 6; then 5 and 5."""
    assert imbalance([9, 3, 5, 5], [0, 1, 0, 1], 2, 2) == pytest.approx((1.5 + 1) / 2)


def skewed(seed: int, count: int, samples: int = 8) -> list[int]:
    """Tokens of groups whose responses are long-tailed: log-normal around 1,000, cut at 8,192."""
    chance = random.Random(seed)
    return [sum(min(8192, round(1000 * math.exp(chance.gauss(0, 1)))) for _ in range(samples)) for _ in range(count)]


@pytest.mark.parametrize(("ranks", "per_rank"), [(2, 16), (8, 4), (16, 2), (16, 8)])
def test_the_busiest_rank_has_little_more_than_the_mean(ranks: int, per_rank: int) -> None:
    """Against dealing in turn, over ten mini-batches."""
    mini_batch = ranks * per_rank
    costs = [cost for seed in range(10) for cost in skewed(seed, mini_batch)]
    in_turn = [number % ranks for number in range(len(costs))]
    owners = deal(costs, mini_batch, ranks, first=0)
    before, after = (imbalance(costs, each, mini_batch, ranks) for each in (in_turn, owners))
    assert after - 1 < (before - 1) / 2
    assert imbalance(costs, owners, len(costs), ranks) < 1.02  # of all mini-batches together


def test_a_sequence_costs_its_products_and_its_attention() -> None:
    """Qwen2.5-Math-7B: a token's forward takes 2 operations a weight, and 2 x layers x width a token there."""
    cost = sequence_cost(read_architecture(read_hf_config(MODELS / "qwen2.5-math-7b")))
    weights = 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 152064 * 3584
    assert cost(1000) == 1000 * (2 * weights + 2 * 28 * 3584 * 1000)
    assert cost(0) == 0 and cost(2000) > 2 * cost(1000)

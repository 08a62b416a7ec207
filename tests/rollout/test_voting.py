"""Votes for a majority: equal answers of different texts count together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_ext.metrics.eval_stats import majority
from megatron_ext.records import Problem, Reward
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.rewards.voting import equal_answers, votes


def test_only_readable_answers_vote() -> None:
    rewards = [
        Reward(1, "correct", "4"),
        Reward(0, "no_answer"),
        Reward(0, "unparsable", "??"),
        Reward(0, "wrong", "5"),
    ]
    assert votes(rewards) == ["4", None, None, "5"]


@pytest.mark.parametrize("answer_format", ["boxed", "answer_line"])
def test_equal_answers_are_those_of_the_verifier(answer_format: str) -> None:
    """By hand: 1/2 three times in three texts beats 3 twice; a countdown's expression counts as its value."""
    halves: Sequence[str | None] = ["3", r"\frac{1}{2}", "3", None, "0.5", r"\frac{2}{4}"]
    numbers: Sequence[str | None] = ["7", "2*4", "8"]
    problems = [Problem("a", "", "9"), Problem("b", "", "8", "countdown", (2, 4))]
    with RewardPool(1, answer_format=answer_format) as pool:
        half, eight = equal_answers(pool.score, problems, [halves, numbers], answer_format)
    assert half == {(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", r"\frac{2}{4}")}
    assert majority(halves, lambda key, answer: (key, answer) in half) == 1
    assert eight == {("2*4", "8")}

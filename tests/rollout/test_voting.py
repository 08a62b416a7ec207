"""Votes for a majority: equal answers of different texts count together."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest

from megatron_ext.metrics.eval_stats import winners
from megatron_ext.records import Problem, Reward
from megatron_ext.rollout.rewards.countdown import exact_value
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
    """By hand: 1/2 three times in three texts beats 3 twice; a countdown's expression counts as its value, a choice as
    its letter."""
    halves: Sequence[str | None] = ["3", r"\frac{1}{2}", "3", None, "0.5", r"\frac{2}{4}"]
    numbers: Sequence[str | None] = ["7", "2*4", "8"]
    letters: Sequence[str | None] = ["A", "(B)", "A", r"\text{B}", "B. the sum", "neither"]
    problems = [
        Problem("a", "", "9", in_thought=True),  # its template opens the reasoning, which no vote has
        Problem("b", "", "8", "countdown", (2, 4)),
        Problem("c", "", "C", "choice"),
        Problem("d", "", "1"),
    ]
    with RewardPool(1, answer_format=answer_format) as pool:
        equal = equal_answers(pool.score, problems, [halves, numbers, letters, [None]], answer_format)
    half, eight, option, nothing = equal
    assert half == {(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", r"\frac{2}{4}")}
    assert eight == {("2*4", "8")} and nothing == set()
    assert option == {("(B)", r"\text{B}"), ("(B)", "B. the sum")}
    assert winners([halves, numbers, letters, [None]], equal) == [1, 1, 1, None]
    assert winners([letters], [set()]) == [0]


@pytest.mark.parametrize(
    ("text", "value"), [("9*5-1", 44), ("-(1-45)", 44), ("2/6", Fraction(1, 3)), (r"\frac{1}{3}", Fraction(1, 3))]
)
def test_the_exact_value_of_arithmetic(text: str, value: Fraction | int) -> None:
    assert exact_value(text) == value


@pytest.mark.parametrize(
    "text",
    ["0.5", "x", "2**3", "1/0", "", r"\frac12", "1=1", "2 3", "(" * 59, "1" * 61, "1,2", "(1,2]", r"2\frac{1}{2}"],
)
def test_what_is_no_arithmetic_has_no_exact_value(text: str) -> None:
    assert exact_value(text) is None

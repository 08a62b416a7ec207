"""Which answers to a problem are the same answer, for a majority vote (metrics/eval_stats.py::winners)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

from megatron_ext.records import Problem, Reward
from megatron_ext.rollout.rewards.choice import letter
from megatron_ext.rollout.rewards.countdown import exact_value
from megatron_ext.rollout.rewards.extraction import as_response
from megatron_ext.rollout.rewards.outcome import Outcome

VOTING = (Outcome.CORRECT, Outcome.WRONG)  # other outcomes have no readable answer to the question asked
Score = Callable[[Sequence[tuple[Problem, str]]], list[Reward]]


class Scored(Protocol):
    """A reward, or what was written of one."""

    @property
    def outcome(self) -> str: ...

    @property
    def extracted(self) -> str | None: ...


def votes(scored: Sequence[Scored]) -> list[str | None]:
    """The answer of each response to one problem; None where it has none that could be read."""
    return [each.extracted if each.outcome in VOTING else None for each in scored]


def equal_answers(
    score: Score, problems: Sequence[Problem], votes: Sequence[Sequence[str | None]], answer_format: str = "boxed"
) -> list[set[tuple[str, str]]]:
    """For each problem the pairs ``(key, answer)`` of different texts that are equal.

    Compared in rounds, for all problems at once: the first answer that equals none before it with all those after it.
    So every pair that a clustering by keys can ask for is there. Letters of choices and plain arithmetic are compared
    here, exactly; everything else is asked of ``score``, the verifier, which reads ``answer_format``. Countdowns are
    compared as numbers.
    """
    found: list[set[tuple[str, str]]] = [set() for _ in votes]
    left = [list(dict.fromkeys(vote for vote in row if vote is not None)) for row in votes]
    while any(len(answers) > 1 for answers in left):
        pairs = [(row, answers[0], other) for row, answers in enumerate(left) for other in answers[1:]]
        for (row, key, other), is_equal in zip(pairs, _compared(score, problems, pairs, answer_format), strict=True):
            if is_equal:
                found[row].add((key, other))
        left = [
            [other for other in answers[1:] if (answers[0], other) not in equal]
            for answers, equal in zip(left, found, strict=True)
        ]
    return found


def _compared(
    score: Score, problems: Sequence[Problem], pairs: Sequence[tuple[int, str, str]], answer_format: str
) -> list[bool]:
    """Whether the two answers of each ``(number of the problem, key, answer)`` are equal."""
    values = [(_value(key, problems[row]), _value(other, problems[row])) for row, key, other in pairs]
    asked = [
        (_asking(problems[row], key), as_response(other, answer_format))
        for (row, key, other), both in zip(pairs, values, strict=True)
        if None in both
    ]
    rewards = iter(score(asked) if asked else [])
    return [next(rewards).outcome == Outcome.CORRECT if None in (a, b) else a == b for a, b in values]


def _value(answer: str, problem: Problem) -> Fraction | str | None:
    """What is compared without the verifier; None where there is no such value."""
    return letter(answer) if problem.verifier == "choice" else exact_value(answer)


def _asking(problem: Problem, key: str) -> Problem:
    """The problem whose gold answer is ``key``, asked of an answer alone: no reasoning comes before it."""
    verifier = "math" if problem.verifier == "countdown" else problem.verifier
    return replace(problem, answer=key, verifier=verifier, numbers=(), in_thought=False)

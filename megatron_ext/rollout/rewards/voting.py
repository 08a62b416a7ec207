"""Which answers to a problem are the same answer, for a majority vote (metrics/eval_stats.py::majority)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ext.records import Problem, Reward
from megatron_ext.rollout.rewards.verify import Outcome, as_response

VOTING = (Outcome.CORRECT, Outcome.WRONG)  # other outcomes have no readable answer to the question asked
Score = Callable[[Sequence[tuple[Problem, str]]], list[Reward]]


def votes(rewards: Sequence[Reward]) -> list[str | None]:
    """The answer of each response to one problem; None where it has none that could be read."""
    return [reward.extracted if reward.outcome in VOTING else None for reward in rewards]


def equal_answers(
    score: Score, problems: Sequence[Problem], votes: Sequence[Sequence[str | None]], answer_format: str = "boxed"
) -> list[set[tuple[str, str]]]:
    """For each problem the pairs ``(key, answer)`` of different texts that its verifier finds equal.

    ``score`` is asked in rounds, for all problems at once: the first answer that equals none before it against all
    those after it. So every pair that a clustering by keys can ask for is there. Countdowns are compared as numbers.
    ``answer_format`` is the one that ``score`` reads.
    """
    found: list[set[tuple[str, str]]] = [set() for _ in votes]
    left = [list(dict.fromkeys(vote for vote in row if vote is not None)) for row in votes]
    while any(len(answers) > 1 for answers in left):
        pairs = [(row, answers[0], other) for row, answers in enumerate(left) for other in answers[1:]]
        rewards = score([(_asking(problems[row], key), as_response(other, answer_format)) for row, key, other in pairs])
        for (row, key, other), reward in zip(pairs, rewards, strict=True):
            if reward.outcome == Outcome.CORRECT:
                found[row].add((key, other))
        left = [
            [other for other in answers[1:] if (answers[0], other) not in equal]
            for answers, equal in zip(left, found, strict=True)
        ]
    return found


def _asking(problem: Problem, key: str) -> Problem:
    """The problem whose gold answer is ``key``."""
    verifier = "math" if problem.verifier == "countdown" else problem.verifier
    return replace(problem, answer=key, verifier=verifier, numbers=())

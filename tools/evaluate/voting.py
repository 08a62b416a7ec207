"""Which answers to a problem are the same: the votes of maj@n."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from megatron_ext.metrics.eval_stats import majority

if TYPE_CHECKING:
    from megatron_ext.types import Problem, Reward


class Pool(Protocol):
    """What is used of a reward pool."""

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]: ...


def winners(pool: Pool, votes: Sequence[Sequence[str | None]]) -> list[int | None]:
    """For each problem which of its answers the majority gave, by its first response; None where nobody answered."""
    return [
        majority(row, lambda key, answer, known=known: (key, answer) in known)
        for row, known in zip(votes, equivalent_answers(pool, votes), strict=True)
    ]


def equivalent_answers(
    pool: Pool, votes: Sequence[Sequence[str | None]], answer_format: str = "boxed"
) -> list[set[tuple[str, str]]]:
    """For each problem the pairs ``(key, answer)`` that the clustering of eval_stats.clusters finds equal.

    ``answer_format`` is the pool's.
    The verifier lives in killable processes, so it is asked in rounds, all problems at once: everything still
    alone against the earliest of them. Plain integer arithmetic is compared here, exactly.
    """
    from megatron_ext.rollout.rewards.verify import as_response
    from megatron_ext.types import Problem

    equal: list[set[tuple[str, str]]] = [set() for _ in votes]
    alone = [list(dict.fromkeys(answer for answer in row if answer is not None)) for row in votes]
    while any(len(answers) > 1 for answers in alone):
        asked: list[tuple[int, str, str]] = []
        for row, answers in enumerate(alone):
            if not answers:
                continue
            key, *others = answers
            for other in others:
                values = exact_value(key), exact_value(other)
                if None in values:
                    asked.append((row, key, other))
                elif values[0] == values[1]:
                    equal[row].add((key, other))
        questions = [(Problem("", "", key), as_response(other, answer_format)) for _, key, other in asked]
        for (row, key, other), reward in zip(asked, pool.score(questions) if questions else [], strict=True):
            if reward.outcome == "correct":
                equal[row].add((key, other))
        alone = [
            [answer for answer in answers[1:] if (answers[0], answer) not in known]
            for answers, known in zip(alone, equal, strict=True)
        ]
    return equal


def exact_value(answer: str) -> Fraction | None:
    """The value of integers joined by ``+ - * /`` and brackets, None for anything else."""
    from ..tiny.task import evaluate as value_of

    try:
        return value_of(answer) if len(answer) <= 60 else None
    except (ValueError, ZeroDivisionError):
        return None

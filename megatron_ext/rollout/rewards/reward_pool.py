"""Rewards of the verifier: a pool of processes that score answers (rollout/rewards/verify.py is what they run).

A verifier that has gone wrong must stop the run, not score it 0: every worker scores known answers before its first
batch and then once a minute, and too large a share of answers without a verdict is an error (worker_pool.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megatron_ext.rollout.rewards.extraction import MAX_ANSWER_CHARS, extract
from megatron_ext.rollout.rewards.outcome import Outcome, counted
from megatron_ext.rollout.rewards.worker_pool import START_S, Program, Worker, WorkerPool
from megatron_ext.rollout.rewards.worker_pool import VerifierError as VerifierError
from megatron_ext.types import Problem, Reward, Sample

WORKER = "megatron_ext.rollout.rewards.verify"


class Question(NamedTuple):
    """What a worker is asked. Equal questions are asked once."""

    extracted: str
    answer: str
    verifier: str = "math"
    numbers: tuple[int, ...] = ()


CANARIES: tuple[tuple[Question, Outcome], ...] = (
    (Question("42", "42"), Outcome.CORRECT),
    (Question("41", "42"), Outcome.WRONG),
    (Question("-7", "7"), Outcome.WRONG),
    (Question(r"\frac{2}{4}", "0.5"), Outcome.CORRECT),
    (Question(r"\frac{1}{3}", "0.5"), Outcome.WRONG),
    (Question(r"2\sqrt{2}", r"\sqrt{8}"), Outcome.CORRECT),
    (Question("x^2+2x+1", "(x+1)^2"), Outcome.CORRECT),
    (Question("x^2+2x+2", "(x+1)^2"), Outcome.WRONG),
    (Question(r"\{2,1\}", "1,2"), Outcome.CORRECT),
    (Question("(1,2]", "[1,2]"), Outcome.WRONG),
    (Question("1=2=3=4", "4"), Outcome.CONTRADICTION),
    (Question("x+1=4", "4"), Outcome.WRONG),
    (Question(r"4\approx 5", "4"), Outcome.UNPARSABLE),
    (Question("3^{-100}", "2^{-100}"), Outcome.WRONG),
    (Question("(1+2)*3", "9", "countdown", (3, 2, 1)), Outcome.CORRECT),
    (Question("3*3", "9", "countdown", (3, 2, 1)), Outcome.WRONG_NUMBERS),
    (Question("(1+3)*2", "9", "countdown", (3, 2, 1)), Outcome.WRONG),
    (Question(r"\textbf{(B)}", "B", "choice"), Outcome.CORRECT),
    (Question("A", "B", "choice"), Outcome.WRONG),
    (Question("A or B", "B", "choice"), Outcome.UNPARSABLE),
)


class RewardPool(WorkerPool[Question]):
    """Scores batches of responses against gold answers. ``correct`` and ``wrong`` are the rewards.

    ``answer_format`` says where an answer stands, as ``prompt.answer_format`` does.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        deadline_s: float = 10.0,
        max_timeout_share: float = 0.2,
        correct: float = 1.0,
        wrong: float = 0.0,
        answer_format: str = "boxed",
    ) -> None:
        super().__init__(Program.of_module(WORKER), workers, deadline_s=deadline_s, max_timeout_share=max_timeout_share)
        self.correct, self.wrong, self.answer_format = correct, wrong, answer_format

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
        """The reward of each ``(problem, response)``, in order.

        Raises ``VerifierError`` when a worker gets a known answer wrong, when workers cannot be started, or
        when more than ``max_timeout_share`` of at least 20 answers got no verdict.
        """
        questions = [_question(problem, response, self.answer_format) for problem, response in answers]
        copies = Counter(question for question in questions if question is not None)
        replies = self.ask_all(copies, len(answers))
        return [self.reward(question, "" if question is None else replies[question]) for question in questions]

    def question(self, problem: Problem, sample: Sample) -> Question | None:
        """Of a response of an engine the text alone counts."""
        return _question(problem, sample.text, self.answer_format)

    def reward(self, question: Question | None, reply: str) -> Reward:
        outcome = Outcome.NO_ANSWER if question is None else self.outcome(reply)
        value = self.correct if outcome is Outcome.CORRECT else self.wrong
        return Reward(value, outcome.value, None if question is None else question.extracted)

    def check_canaries(self) -> None:
        """Have every worker score the known answers now. Raises ``VerifierError``. ``score`` does it by itself."""
        for worker in self._workers:
            worker.check_due = -math.inf
        self.ask_all(Counter(), 0)

    def check(self, worker: Worker) -> None:
        for question, expected in CANARIES:
            found = self.outcome(worker.ask(question, START_S))
            if found is not expected:
                raise VerifierError(
                    f"reward: the verifier gives a known answer the wrong outcome: {question.extracted!r} to gold "
                    f"{question.answer!r} ({question.verifier}), found {found.value}, expected {expected.value}. "
                    "Compare the installed math-verify, latex2sympy2_extended and sympy with the pinned versions"
                )

    def outcome(self, reply: str) -> Outcome:
        return Outcome(reply)

    def described(self, question: Question, reply: str) -> str:
        return (
            f"{reply}, answer {question.extracted[:200]!r} to gold {question.answer[:200]!r}. If the machine is "
            "overloaded lower reward.workers or raise reward.deadline_s; otherwise look at what the policy writes"
        )


def outcome_counts(rewards: Sequence[Reward]) -> dict[str, int]:
    """How many rewards have each outcome: every ``Outcome`` is a key, zeros included."""
    counts = Counter(counted(reward.outcome) for reward in rewards)
    return {outcome.value: counts[outcome] for outcome in Outcome}


def _question(problem: Problem, response: str, answer_format: str) -> Question | None:
    extracted = extract(response, answer_format, in_thought=problem.in_thought)
    if extracted is None:
        return None
    # one character beyond the limit is enough to be scored too long
    short = extracted[: MAX_ANSWER_CHARS + 1]
    return Question(short, problem.answer, problem.verifier, problem.numbers)

"""Rewards of a function of the user's own (``reward.function``), in the same killable processes as the verifier.

    def score(problem: Problem, response: Response, *, option: float = 0.5) -> float | Reward

It is called in a worker (rollout/rewards/function_worker.py), once for equal responses to the same problem. What it
raises, and a value that is no finite number, is one reward ``reward.wrong`` with outcome ``error``; more such than the
share ``reward.max_timeout_share`` of a batch stop the run, as answers do whose worker was killed at the deadline.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any, NamedTuple

from megatron_ext.config.schema import RewardConfig
from megatron_ext.records import Problem, Response, Reward
from megatron_ext.rollout.rewards.functions import find_reward
from megatron_ext.rollout.rewards.outcome import Outcome, counted
from megatron_ext.rollout.rewards.worker_pool import NO_VERDICT, Program, WorkerPool
from megatron_ext.types import Sample

WORKER = "megatron_ext.rollout.rewards.function_worker"


class Question(NamedTuple):
    """What a worker is asked. Equal questions are asked once."""

    problem: tuple[Any, ...]
    response: tuple[Any, ...]


class FunctionPool(WorkerPool[Question]):
    """Scores responses with the function that ``reward`` names, on ``workers`` processes."""

    def __init__(self, reward: RewardConfig, workers: int) -> None:
        find_reward(reward)
        program = Program.of_module(WORKER, greeting=json.dumps([reward.function, reward.options]))
        super().__init__(program, workers, deadline_s=reward.deadline_s, max_timeout_share=reward.max_timeout_share)
        self.config = reward

    def question(self, problem: Problem, sample: Sample) -> Question:
        return Question(astuple(problem), astuple(Response(sample.text, sample.response_ids, sample.truncated)))

    def outcome(self, reply: str) -> Outcome:
        return Outcome(reply) if reply in NO_VERDICT else counted(json.loads(reply)[1])

    def described(self, question: Question, reply: str) -> str:
        found = reply if reply in NO_VERDICT else json.loads(reply)[2]
        problem, response = Problem(*question.problem), Response(*question.response)
        return (
            f"{found}, {self.config.function} of problem {problem.problem_id} and the response "
            f"{response.text[:200]!r}. Mend the function; if it is only slow, raise reward.deadline_s"
        )

    def reward(self, question: Question | None, reply: str) -> Reward:
        """A number alone is ``correct`` from reward.correct on, ``wrong`` up to reward.wrong, ``other`` between."""
        if reply in NO_VERDICT:
            return Reward(self.config.wrong, reply)
        value, outcome, extracted = json.loads(reply)
        if outcome == Outcome.ERROR:
            return Reward(self.config.wrong, outcome, extracted)
        if outcome is None:
            right, wrong = value >= self.config.correct, value <= self.config.wrong
            outcome = Outcome.CORRECT if right else Outcome.WRONG if wrong else Outcome.OTHER
        return Reward(value, str(outcome), extracted)

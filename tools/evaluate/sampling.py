"""Responses to encoded problems: sampled where they are not there yet, scored, and reduced to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from megatron_ext.metrics.eval_stats import winners

from ..progress import ToolProgress
from .results import problem_row, results
from .samples_file import Samples
from .settings import Settings

if TYPE_CHECKING:
    from megatron_ext.rollout.base import OnBatch, Request, Sampling
    from megatron_ext.types import Problem, Reward, Sample

Encoded = Sequence[tuple["Problem", tuple[int, ...]]]


class Engine(Protocol):
    """What is used of a rollout engine."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch | None = None
    ) -> list[Sample]: ...


class Pool(Protocol):
    """What is used of a reward pool."""

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]: ...


@dataclass(frozen=True)
class Lengths:
    """Tokens of a response: asked for, and what the model's positions leave behind its prompts, at least and at most.

    ``positions`` None: the model states none.
    """

    asked: int
    positions: int | None
    used_min: int
    used_max: int

    @classmethod
    def of(cls, encoded: Encoded, settings: Settings, positions: int | None) -> Lengths:
        sizes = [len(ids) for _, ids in encoded]
        asked = settings.max_response_tokens
        room = [asked if positions is None else min(asked, positions - size) for size in (max(sizes), min(sizes))]
        return cls(asked, positions, *room)

    def limit(self, prompt_ids: tuple[int, ...]) -> int:
        """Of a response to this prompt."""
        return self.asked if self.positions is None else min(self.asked, self.positions - len(prompt_ids))


@dataclass
class SetEvaluation:
    """A set in one model's tokens, with the responses that are there."""

    name: str
    settings: Settings
    encoded: Encoded
    lengths: Lengths
    samples: Samples

    def todo(self) -> list[tuple[int, int]]:
        """Responses that are missing, as numbers of problem and response; prompts of similar length together."""
        there = self.samples.responses
        every = [(row, n) for row in range(len(self.encoded)) for n in range(self.settings.samples)]
        missing = [(row, n) for row, n in every if (self.encoded[row][0].problem_id, n) not in there]
        return sorted(missing, key=lambda each: len(self.encoded[each[0]][1]))

    def sample(self, engine: Engine, pool: Pool, progress: ToolProgress, at_once: int) -> int:
        """Sample and score what is missing, ``at_once`` responses at a time; how many tokens that were.

        A response depends on the seed, its problem's number in the file and its own number, not on the batching.
        """
        from megatron_ext.rollout.base import Request, Sampling
        from megatron_ext.rollout.sampling import seed_of

        todo, total = self.todo(), len(self.encoded) * self.settings.samples
        task = progress.add_task(f"sampling {self.name}".rstrip(), total=total, completed=total - len(todo))
        sampling = Sampling(self.settings.temperature, self.settings.top_p, self.lengths.used_max)
        num_tokens = 0
        for first in range(0, len(todo), at_once):
            part = [(*self.encoded[row], row, n) for row, n in todo[first : first + at_once]]
            requests = [Request(ids, seed_of(self.settings.seed, row, n)) for _, ids, row, n in part]
            found = engine.generate(requests, sampling, lambda done: progress.advance(task, len(done)))
            found = [cut(sample, self.lengths.limit(sample.prompt_ids), engine) for sample in found]
            rewards = pool.score([(problem, sample.text) for (problem, *_), sample in zip(part, found, strict=True)])
            self.samples.append(
                [
                    sample_line(self.name, problem, n, sample, reward)
                    for (problem, _, _, n), sample, reward in zip(part, found, rewards, strict=True)
                ]
            )
            num_tokens += sum(len(sample.response_ids) for sample in found)
        return num_tokens

    def result(self, pool: Pool, answer_format: str = "boxed") -> dict[str, Any]:
        """The numbers, when all responses are there; ``pool``, of ``answer_format``, says which answers are the same.

        Raises VerifierError when it cannot.
        """
        from megatron_ext.rollout.rewards.voting import equal_answers, votes

        numbers = range(self.settings.samples)
        problems = [problem for problem, _ in self.encoded]
        responses = [[self.samples.responses[problem.problem_id, n] for n in numbers] for problem in problems]
        cast = [votes(row) for row in responses]
        won = winners(cast, equal_answers(pool.score, problems, cast, answer_format))
        rows = [problem_row(*each) for each in zip(problems, responses, won, strict=True)]
        ks = self.settings.reported_ks()
        return {
            "decoding": asdict(self.settings) | {"ks": ks},
            **results(rows, responses, ks),
            "problems": rows,
        }


def measure(
    engine: Engine,
    pool: Pool,
    problems: Encoded,
    settings: Settings,
    *,
    console: Console,
    answer_format: str = "boxed",
) -> dict[str, Any]:
    """Sample every problem ``settings.samples`` times, score, and reduce to metrics with 95 % intervals."""
    each = SetEvaluation("", settings, problems, Lengths.of(problems, settings, None), Samples())
    with ToolProgress(console) as progress:
        each.sample(engine, pool, progress, 1024)
    return each.result(pool, answer_format)


def sample_line(name: str, problem: Problem, number: int, sample: Sample, reward: Reward) -> dict[str, Any]:
    """A scored response as a line of a samples file."""
    return {
        "set": name,
        "id": problem.problem_id,
        "sample": number,
        "text": sample.text,
        "response_ids": list(sample.response_ids),
        "length": len(sample.response_ids),
        "truncated": sample.truncated,
        "outcome": str(reward.outcome),
        "extracted": reward.extracted,
        "correct": reward.outcome == "correct",
    }


def cut(sample: Sample, limit: int, engine: Any) -> Sample:
    """The sample without what is beyond ``limit`` tokens."""
    if len(sample.response_ids) <= limit:
        return sample
    ids = sample.response_ids[:limit]
    text = engine.tokenizer.decode(ids, skip_special_tokens=True)
    return replace(sample, response_ids=ids, logprobs=sample.logprobs[:limit], text=text, truncated=True)

"""Validation during training: a fixed set of problems, answered by the policy as it is, before training and on the way.

It leaves training as it finds it, to the bit. Seeds follow from the run's seed, the problem's number in its file and
the response's number, so they are the same at every step, and those of ``megatron-entropy evaluate --seed`` with the
same problems; no random number is drawn. The engine gets the weights again before the next step's rollout, so what it
keeps of the validated prompts is gone by then.

The problems are sampled in parts: as many responses as a training step has, or as the engine decodes at once if those
are more. Before each part the run asks whether it is to stop; then the validation is given up, and made anew when the
run goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.metrics.display import Phase
from megatron_ext.metrics.eval_stats import avg_at_k, pass_at_k, winners
from megatron_ext.model import parallel
from megatron_ext.rollout.base import Request, RolloutEngine, RolloutError, Sampling
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.rewards.voting import equal_answers, votes
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.train.collect_rollouts import gathered
from megatron_ext.train.training_data import load_problems
from megatron_ext.types import Problem, Reward

PREFIX = "validation/"


@dataclass(frozen=True)
class Answer:
    """What counts of one response: its reward, its length in tokens, and whether it was cut off."""

    reward: Reward
    length: int
    truncated: bool


@dataclass(frozen=True)
class Asked:
    """A problem of a validation: its file's stem, its number there, the problem and its prompt's tokens."""

    file: str
    number: int
    problem: Problem
    prompt_ids: tuple[int, ...]


@dataclass
class Validation:
    """The validations of a run: when they are due, what they measure, and which step was the best so far."""

    config: Config
    problems: Sequence[Asked] = ()
    baseline: dict[str, float] = field(default_factory=dict)  # metrics before training
    best_step: int | None = None  # of those whose checkpoint is kept
    best_value: float = 0.0
    suspended: str = ""  # what the best so far was measured with, of a run that does not validate for now

    def is_due(self, step: int) -> bool:
        """Before training, after every so many steps, and after the last one."""
        every = self.config.validation.every
        return bool(every) and (step % every == 0 or step == self.config.train.steps)

    def measure(
        self,
        engine: RolloutEngine,
        pool: RewardPool | FunctionPool,
        version: int,
        phase: Phase,
        is_stopped: Callable[[], bool],
    ) -> dict[str, float] | None:
        """The metrics of the engine's weights, which are ``version``, on every rank; None if the run is to stop."""
        settings, seed = self.config.validation, self.config.train.seed
        sampling = Sampling(settings.temperature, settings.top_p, self.config.max_validation_tokens)
        rollout, world = self.config.rollout, dist.get_world_size()
        size = -(-max(rollout.prompts * rollout.samples, rollout.batch_size * world) // settings.samples)
        own: dict[tuple[int, int], Answer] = {}
        for first in range(0, len(self.problems), size):
            if is_stopped():
                return None
            part = range(first, min(first + size, len(self.problems)))
            indices = [(number, sample) for number in part for sample in range(settings.samples)]
            mine = indices[dist.get_rank() :: world]
            asked = [(self.problems[number], sample) for number, sample in mine]
            requests = [Request(each.prompt_ids, seed_of(seed, each.number, sample)) for each, sample in asked]
            samples = engine.generate(requests, sampling, lambda done: phase.advance(len(done)))
            if stale := {sample.weight_version for sample in samples} - {version}:
                raise RolloutError(f"validation: samples of weight versions {sorted(stale)}, expected {version} only")
            pairs = [(each.problem, answer) for (each, _), answer in zip(asked, samples, strict=True)]
            rewards = pool.score_samples(pairs)
            own |= {
                index: Answer(reward, len(sample.response_ids), sample.truncated)
                for index, sample, reward in zip(mine, samples, rewards, strict=True)
            }
        everyone = gathered(own, parallel.gloo())
        answers = [[everyone[n, sample] for sample in range(settings.samples)] for n in range(len(self.problems))]
        majorities = self._majorities(pool, [each.problem for each in self.problems], answers)
        return summarise(self.problems, answers, majorities)

    def _majorities(
        self, pool: RewardPool | FunctionPool, problems: Sequence[Problem], answers: Sequence[Sequence[Answer]]
    ) -> list[bool]:
        """Whether the most frequent answer to each problem is correct; each rank counts the votes of a part of them."""
        own = range(dist.get_rank(), len(problems), dist.get_world_size())
        rewards = [[answer.reward for answer in answers[number]] for number in own]
        cast = [votes(row) for row in rewards]
        # a reward function of the user's own compares no answers: those of the same text are the same
        equal: list[set[tuple[str, str]]] = [set() for _ in own]
        if not isinstance(pool, FunctionPool):
            asked = [problems[number] for number in own]
            equal = equal_answers(pool.score, asked, cast, self.config.prompt.answer_format)
        found = {
            number: winner is not None and row[winner].outcome == Outcome.CORRECT
            for number, row, winner in zip(own, rewards, winners(cast, equal), strict=True)
        }
        everyone = gathered(found, parallel.gloo())
        return [everyone[number] for number in range(len(problems))]

    def take(self, step: int, metrics: dict[str, float]) -> str:
        """Remember the metrics of ``step``; a line for the user. Step 0 is what others are compared with, never best:
        its weights are those of the model directory."""
        values = {name: metrics[PREFIX + name] for name in ("avg", "pass", "maj")}
        shares = ", ".join(f"{name}@{self.config.validation.samples} {value:.1%}" for name, value in values.items())
        line = f"validation after step {step}: {shares} of {len(self.problems)} problems"
        if step == 0:
            self.baseline = dict(metrics)
            return line
        value = values[self.config.validation.metric]
        if not self.config.validation.keep_best:
            return line
        if self.best_step is None or value > self.best_value:
            self.best_step, self.best_value = step, value
            return f"{line}; the best so far"
        return f"{line}; the best is step {self.best_step} with {self.config.validation.metric} {self.best_value:.1%}"

    def state_dict(self) -> dict[str, Any]:
        best = None if self.best_step is None else {"step": self.best_step, "value": self.best_value}
        return {"baseline": self.baseline, "best": best, "measures": self.suspended or self.measures()}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from ``state``, unless it is of other problems or settings; then a line says that it is forgotten."""
        best, on = state["best"], bool(self.config.validation.every)
        if not on:
            self.suspended = state["measures"]
        if on and state["measures"] != self.measures():
            return (
                "validation: its data or settings differ from the checkpoint's: what was best is forgotten, and its "
                "checkpoint is kept as long as others"
            )
        if on and not self.config.validation.keep_best:
            best = None
        self.baseline = state["baseline"]
        self.best_step, self.best_value = (best["step"], best["value"]) if best else (None, 0.0)
        return None

    def measures(self) -> str:
        """What follows from problems and settings: values are comparable only where it is the same."""
        s = self.config.validation
        settings = (s.metric, s.samples, s.temperature, s.top_p, self.config.max_validation_tokens)
        problems = [(each.prompt_ids, each.problem.answer, each.problem.verifier) for each in self.problems]
        return hashlib.sha256(json.dumps([settings, problems]).encode()).hexdigest()


def summarise(
    problems: Sequence[Asked], answers: Sequence[Sequence[Answer]], majorities: Sequence[bool]
) -> dict[str, float]:
    """Means over problems of avg@n, pass@n and maj@n, and over responses of their length and of those cut off.

    Of several files each has its own, and the whole is the mean of theirs, as papers average over benchmarks; of one
    file each kind of problem, where there are several.
    """
    files = {each.file for each in problems}
    shares: dict[str, list[dict[str, float]]] = {}
    for each, row, right in zip(problems, answers, majorities, strict=True):
        n, c = len(row), sum(answer.reward.outcome == Outcome.CORRECT for answer in row)
        part = each.file if len(files) > 1 else each.problem.kind or each.problem.verifier
        part = re.sub(r"[^\w .-]", "-", part)  # a slash would make it two parts of a name
        values = {"avg": avg_at_k(n, c), "pass": pass_at_k(n, c, n), "maj": float(right)}
        shares.setdefault(part, []).append(values)
    means = {part: _means(shares[part]) for part in sorted(shares)}
    whole = _means(list(means.values()) if len(files) > 1 else [each for part in shares.values() for each in part])
    metrics = {PREFIX + name: mean for name, mean in whole.items()}
    if len(shares) > 1:
        metrics |= {f"{PREFIX}{name}/{part}": mean for part in means for name, mean in means[part].items()}
    responses = [answer for row in answers for answer in row]
    metrics[f"{PREFIX}length"] = sum(answer.length for answer in responses) / len(responses)
    metrics[f"{PREFIX}truncated"] = sum(answer.truncated for answer in responses) / len(responses)
    return metrics


def _means(values: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in values) / len(values) for name in values[0]}


def load_validation(config: Config, pool: RewardPool | FunctionPool, *, vocab_size: int) -> Validation:
    """The problems of ``validation.data``, read and encoded as the training data are. Raises ConfigError.

    Only faults are left out or stop the run: ``data.strict`` is for the training data.
    """
    if not config.validation.every:
        return Validation(config)
    asked = []
    for path in config.validation.data:
        data = config.data.model_copy(update={"train": path, "strict": False})
        try:
            problems = load_problems(config.model_copy(update={"data": data}), pool, vocab_size=vocab_size)
        except ConfigError as error:
            raise ConfigError(str(error).replace("data.train", "validation.data")) from error
        asked += [Asked(Path(path).stem, number, problem, ids) for number, (problem, ids) in enumerate(problems)]
    return Validation(config, asked)

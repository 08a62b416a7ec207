"""Whole runs of the training loop in forked ranks of this process: under a second each, nothing to start.

The tiny model and 64 of its problems, real rollouts and updates; the answers are scored here, by exact arithmetic,
without the pool of verifier processes. What a run leaves behind is compared by ``metrics`` and ``contents``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.loading import load_config
from megatron_ext.rollout.rewards.extraction import extract
from megatron_ext.rollout.rewards.verify import VERIFIERS
from megatron_ext.train import loop, setup
from megatron_ext.types import Problem, Reward, Sample
from tests import gloo

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    *("rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2", "train.steps=2", "checkpoint.every=1"),
    *('name="run"', "log.trackers=[]", "log.samples=0", "parallel.tensor=1", "parallel.ranks_per_node=1"),
)


class ExactRewards:
    """In the place of the reward pool: countdowns exactly, everything else is its gold answer or wrong."""

    def __init__(self, *_: Any, correct: float = 1.0, wrong: float = 0.0, **__: Any) -> None:
        self.correct, self.wrong = correct, wrong

    def __enter__(self) -> ExactRewards:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def scoring(self, num_answers: int, replies: dict[Any, str]) -> Iterator[ExactRewards]:
        yield self

    def submit(self, samples: Sequence[tuple[Problem, Sample]]) -> None:
        """Scored with the others."""

    def look_up(self, problem: Problem, sample: Sample) -> Reward:
        return self.reward(problem, sample.text)

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
        return [self.reward(problem, response) for problem, response in answers]

    def score_samples(self, samples: Sequence[tuple[Problem, Sample]]) -> list[Reward]:
        return self.score([(problem, sample.text) for problem, sample in samples])

    def reward(self, problem: Problem, response: str) -> Reward:
        boxed = extract(response)
        if boxed is None:
            return Reward(self.wrong, "no_answer")
        if problem.verifier == "countdown":
            outcome = VERIFIERS["countdown"](boxed, problem.answer, problem.numbers).value
        else:
            outcome = "correct" if boxed == problem.answer else "wrong"
        return Reward(self.correct if outcome == "correct" else self.wrong, outcome, boxed)


def train(folder: Path, recipe: str, *overrides: str, world: int = 1) -> int:
    """Run (or resume) ``recipe`` below ``folder`` on ``world`` ranks; the exit code, or the first rank's exception."""
    data()
    return gloo.run(_rank, world, folder, recipe, overrides, None)[0]


def train_and_die(folder: Path, recipe: str, *overrides: str, after: int, world: int = 1) -> None:
    """The same, but every rank gets SIGKILL when it begins the step after step ``after``, whose save is through."""
    data()
    try:
        gloo.run(_rank, world, folder, recipe, overrides, after)
    except AssertionError as error:
        if "died without a report" in str(error):
            return
        raise
    raise AssertionError(f"the run ended before step {after + 1}")


def _rank(rank: int, world: int, folder: Path, recipe: str, overrides: Sequence[str], die_after: int | None) -> int:
    gc.freeze()  # Megatron collects garbage at every save: not all that the parent imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    module: Any = loop
    before: Any = setup
    before.RewardPool = ExactRewards
    real = loop.train_step

    def train_step(trainer: loop.Trainer, watch: Any) -> Any:
        if trainer.step == die_after:
            trainer.checkpoints.publish(wait=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(trainer, watch)

    module.train_step = train_step
    own = (f'data.train="{data()}"', 'data.curriculum=""', f'log.dir="{folder}"', f"parallel.ranks_per_node={world}")
    return loop.run(load_config(RECIPES / recipe, [*SMALL, *own, *overrides]))


@functools.cache
def data() -> Path:
    """The first 64 problems of the tiny task."""
    path = Path(tempfile.mkdtemp(prefix="tiny-")) / "train.jsonl"
    lines = (RECIPES / "tiny" / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:64]))
    return path


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the run reported."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What the run reported, without what depends on the machine's speed."""
    return [
        {key: value for key, value in step.items() if not key.startswith(("time/", "speed/"))} for step in steps(folder)
    ]


def contents(folder: Path, step: int) -> dict[str, str]:
    """Every file of a checkpoint with its hash; torch's index holds a random identifier and is left out."""
    manifest = folder / "run" / "checkpoints" / f"step_{step:06d}" / "MANIFEST.json"
    files = json.loads(manifest.read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if name != ".metadata"}

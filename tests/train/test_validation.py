"""Validation during training: what it measures, what it must not touch, and the best checkpoint that it keeps.

Runs are real (whole_run.py): the tiny model, its own rollouts and updates, in forked ranks.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.schema import Config
from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.train.trainer import Trainer
from megatron_ext.train.validation import Answer, Asked, Validation, summarise
from megatron_ext.types import Problem, Reward
from tests import gloo
from tests.train import whole_run
from tools import compare_runs

SIREN, GRPO = "siren/siren-tiny-cpu.toml", "grpo/grpo-tiny-cpu.toml"
SAMPLES = 2
Hook = Callable[[], None]


@functools.cache
def problems() -> Path:
    """Twelve countdowns and eight sums that are not in the training data."""
    path = Path(tempfile.mkdtemp(prefix="validation-")) / "validation.jsonl"
    rows = (whole_run.RECIPES / "tiny" / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    sums = [row for row in rows if '"math"' in row]
    path.write_text("".join(sums[:8] + [row for row in rows if row not in sums][:12]))
    return path


def options(*more: str, every: int = 1) -> tuple[str, ...]:
    own = (f'validation.data="{problems()}"', f"validation.every={every}", f"validation.samples={SAMPLES}")
    return (*own, *more)


def validated(folder: Path) -> list[dict[str, float]]:
    """What each line of metrics.jsonl says of a validation, with its step."""
    return [
        {key: value for key, value in step.items() if key == "step" or key.startswith("validation/")}
        for step in whole_run.metrics(folder)
        if "validation/avg" in step
    ]


def trained(folder: Path) -> list[dict[str, Any]]:
    """The metrics of training alone."""
    return [dict(each) for each in compare_runs.without_validation(whole_run.metrics(folder))]


def tensors(folder: Path, step: int) -> dict[str, str]:
    files = whole_run.contents(folder, step)
    return {name: digest for name, digest in files.items() if name != "state.pt"}


def state(folder: Path, step: int) -> dict[str, Any]:
    path = folder / "run" / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return torch.load(path, weights_only=True)


def kept(folder: Path) -> tuple[list[str], str]:
    """The checkpoints that are there, and what ``best`` names."""
    root = folder / "run" / "checkpoints"
    return sorted(path.name for path in root.iterdir() if path.is_dir()), (root / "best").read_text().strip()


def hooked(
    rank: int, world: int, folder: Path, recipe: str, overrides: Sequence[str], values: Sequence[float], hooks: dict
) -> int:
    """A run whose validations find ``values`` (by step; none: what they measure). ``hooks`` happen before a validation
    of a step, ``"validate", step``, or before the save after it, ``"save", step``."""
    cls: Any = Validation
    trainer: Any = Trainer
    measure, save = Validation.measure, Trainer.save

    def measured(self: Validation, engine: Any, pool: Any, version: int, phase: Any, is_stopped: Any) -> Any:
        hooks.get(("validate", version), lambda: None)()
        if not values or is_stopped():
            return measure(self, engine, pool, version, phase, is_stopped)
        return {f"validation/{name}": values[version] for name in ("avg", "pass", "maj")}

    def saved(self: Trainer, watch: Any) -> None:
        if ("save", self.step) in hooks:
            self.checkpoints.publish(wait=True)  # the one before is through
            hooks["save", self.step]()
        save(self, watch)

    cls.measure, trainer.save = measured, saved
    return whole_run._rank(rank, world, folder, recipe, overrides, None)


def train(folder: Path, *overrides: str, values: Sequence[float] = (), hooks: dict | None = None) -> int:
    whole_run.data()
    return gloo.run(hooked, 1, folder, GRPO, overrides, values, hooks or {})[0]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [(SIREN, ()), (SIREN, ("parallel.tensor=2",)), (GRPO, ("optimizer.lr=1e-2", "rollout.dynamic_sampling=true"))],
    ids=["one rank", "TP 2", "DP 2"],
)
def test_training_is_the_same_to_the_bit(recipe: str, layout: tuple[str, ...], tmp_path: Path) -> None:
    world = 2 if layout else 1
    for name, more in (("without", ()), ("with", options())):
        assert whole_run.train(tmp_path / name, recipe, *layout, *more, world=world) == 0
    assert trained(tmp_path / "with") == whole_run.metrics(tmp_path / "without")
    assert [each["step"] for each in validated(tmp_path / "with")] == [0, 1, 2]
    for step in (1, 2):
        assert tensors(tmp_path / "with", step) == tensors(tmp_path / "without", step)
        with_it, without = (state(tmp_path / name, step) for name in ("with", "without"))
        assert with_it["state"].pop("validation")["baseline"] and "validation" not in without["state"]
        assert repr(with_it) == repr(without)
    assert compare_runs.main(["--bitwise", str(tmp_path / "with/run"), str(tmp_path / "without/run")]) == 0


def test_without_validation_nothing_is_asked_and_nothing_is_kept(tmp_path: Path) -> None:
    off = options(every=0)
    assert train(tmp_path, *off, hooks={("validate", step): die for step in range(3)}) == 0
    assert not validated(tmp_path) and not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_the_first_validation_measures_the_model_directory(tmp_path: Path) -> None:
    """Sampled here by transformers alone, one response at a time, and scored by hand."""
    assert whole_run.train(tmp_path, GRPO, *options("train.steps=1", "validation.temperature=0.7")) == 0
    rows = [json.loads(line) for line in problems().read_text().splitlines()]
    engine, score = HFEngine(whole_run.RECIPES / "tiny" / "base"), whole_run.ExactRewards().reward
    sampling, right, voted, length = Sampling(0.7, 1.0, 32), [], [], 0
    for number, row in enumerate(rows):
        problem = Problem("", row["prompt"], row["answer"], row["verifier"], tuple(row["numbers"]))
        turn = [{"role": "user", "content": row["prompt"]}]
        text = engine.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids, found = tuple(engine.tokenizer.encode(text, add_special_tokens=False)), []
        for sample in range(SAMPLES):
            [response] = engine.generate([Request(ids, seed_of(0, number, sample))], sampling)
            found.append(score(problem, response.text).outcome)
            length += len(response.response_ids)
        right.append(found.count("correct"))
        readable = [outcome for outcome in found if outcome in ("correct", "wrong")]
        voted.append(readable[:1] == ["correct"])  # of two answers the first wins
    first = validated(tmp_path)[0]
    assert 0 < sum(right) < len(rows) * SAMPLES
    assert first["validation/avg"] == pytest.approx(sum(right) / len(rows) / SAMPLES, abs=1e-12)
    assert first["validation/pass"] == sum(c > 0 for c in right) / len(rows)
    assert first["validation/maj"] == sum(voted) / len(rows)
    assert first["validation/length"] == length / len(rows) / SAMPLES
    assert first["validation/avg/math"] == pytest.approx(sum(right[:8]) / 8 / SAMPLES, abs=1e-12)


def test_it_measures_the_weights_after_the_last_update_and_every_layout_the_same(tmp_path: Path) -> None:
    """Two data-parallel ranks update a half each; a run that begins with their checkpoint validates the same."""
    fast = options("optimizer.lr=1e-2", "validation.samples=4", "train.steps=2")
    assert whole_run.train(tmp_path / "dp", GRPO, *fast, world=2) == 0
    weights = f'model.weights="{tmp_path}/dp/run/checkpoints/step_000002"'
    first, _, last = validated(tmp_path / "dp")
    for name, world, layout in (("one rank", 1, ()), ("TP 2", 2, ("parallel.tensor=2",))):
        assert whole_run.train(tmp_path / name, GRPO, *fast, weights, *layout, "train.steps=1", world=world) == 0
        assert validated(tmp_path / name)[0] == last | {"step": 0}
    assert last["validation/avg"] != first["validation/avg"]


VALUES = (0.9, 0.3, 0.6, 0.6, 0.2)  # of steps 0 (never kept) to 4


@pytest.mark.parametrize(("every", "asynchronous"), [(0, "true"), (1, "true"), (3, "false")])
def test_the_best_checkpoint_stays_beside_the_newest(every: int, asynchronous: str, tmp_path: Path) -> None:
    saving = (f"checkpoint.every={every}", "checkpoint.keep=1", f"checkpoint.asynchronous={asynchronous}")
    assert train(tmp_path, *options("train.steps=4", *saving), values=VALUES) == 0
    assert kept(tmp_path) == (["step_000002", "step_000004"], "step_000002")


def test_without_keep_best_only_the_newest_stays(tmp_path: Path) -> None:
    saving = ("checkpoint.every=1", "checkpoint.keep=1", "validation.keep_best=false", "train.steps=4")
    assert train(tmp_path, *options(*saving), values=VALUES) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000004"]
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_the_metric_decides_what_is_best_and_the_interval_what_is_validated(tmp_path: Path) -> None:
    more = ("train.steps=5", "checkpoint.keep=1", 'validation.metric="pass"', "checkpoint.every=0")
    assert train(tmp_path, *options(*more, every=2), values=(0.9, 0.0, 0.1, 0.0, 0.5, 0.4)) == 0
    assert [each["step"] for each in validated(tmp_path)] == [0, 2, 4, 5]
    assert kept(tmp_path) == (["step_000004", "step_000005"], "step_000004")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, *options(*KILLED), values=MEASURED) == 0
    return folder


MEASURED = (0.1, 0.3, 0.2, 0.6, 0.2)
KILLED = ("train.steps=4", "checkpoint.every=2", "checkpoint.keep=1")
DEATHS = {
    "in the first validation": {("validate", 0): die},
    "in a validation": {("validate", 3): die},
    "before the best is saved": {("save", 3): die},  # nothing else is due
    "before the next save": {("save", 4): die},
}


@pytest.mark.parametrize("hooks", DEATHS.values(), ids=DEATHS)
def test_a_killed_run_goes_on_to_the_same_end(hooks: dict, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without a report"):
        train(tmp_path, *options(*KILLED), values=MEASURED, hooks=hooks)
    assert train(tmp_path, *options(*KILLED), values=MEASURED) == 0
    for folder in (uninterrupted, tmp_path):
        assert kept(folder) == (["step_000003", "step_000004"], "step_000003")
    assert whole_run.metrics(tmp_path) == whole_run.metrics(uninterrupted)
    assert tensors(tmp_path, 4) == tensors(uninterrupted, 4)
    assert repr(state(tmp_path, 4)) == repr(state(uninterrupted, 4))


@pytest.mark.parametrize("step", range(5))
def test_a_signal_ends_a_validation_and_the_next_start_makes_it_anew(
    step: int, uninterrupted: Path, tmp_path: Path
) -> None:
    assert train(tmp_path, *options(*KILLED), values=MEASURED, hooks={("validate", step): ask_to_stop}) == 75
    assert [each["step"] for each in validated(tmp_path)] == list(range(step))
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:06d}").is_dir()
    assert train(tmp_path, *options(*KILLED), values=MEASURED) == 0
    assert whole_run.metrics(tmp_path) == whole_run.metrics(uninterrupted)
    assert kept(tmp_path) == kept(uninterrupted)
    assert tensors(tmp_path, 4) == tensors(uninterrupted, 4)


def test_the_last_validation_decides_what_is_best_also_where_a_signal_ended_it(tmp_path: Path) -> None:
    """The checkpoint of the step before it is found better is there already."""
    rising = (0.1, 0.3, 0.2, 0.4, 0.6)
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    assert train(whole, *options(*KILLED), values=rising) == 0
    assert train(ended, *options(*KILLED), values=rising, hooks={("validate", 4): ask_to_stop}) == 75
    assert kept(ended) == (["step_000003", "step_000004"], "step_000003")
    assert train(ended, *options(*KILLED), values=rising) == 0
    assert kept(ended) == kept(whole) == (["step_000004"], "step_000004")
    assert repr(state(ended, 4)) == repr(state(whole, 4)) and tensors(ended, 4) == tensors(whole, 4)
    assert train(ended, *options(*KILLED), values=rising, hooks={("validate", 4): die}) == 0  # nothing is left to do


def test_a_run_of_fewer_steps_finishes_the_step_that_it_was_in(tmp_path: Path) -> None:
    assert train(tmp_path, *options(*KILLED), values=MEASURED, hooks={("validate", 3): ask_to_stop}) == 75
    assert train(tmp_path, *options(*KILLED), "train.steps=2", values=MEASURED) == 0
    assert [each["step"] for each in validated(tmp_path)] == [0, 1, 2, 3]


def test_a_validation_is_asked_in_parts_whether_to_go_on(tmp_path: Path) -> None:
    """Twenty problems, two responses each, eight problems at a time."""
    small = options("rollout.batch_size=4", "train.steps=1")
    asked: list[int] = []

    def count(rank: int, world: int) -> list[int]:
        cls: Any = HFEngine
        generate = HFEngine.generate

        def counted(self: HFEngine, requests: Any, *rest: Any) -> Any:
            asked.append(len(requests))
            return generate(self, requests, *rest)

        cls.generate = counted
        whole_run._rank(rank, world, tmp_path, GRPO, small, None)
        return asked

    whole_run.data()
    assert gloo.run(count, 1)[0] == [16, 16, 8, 16, 16, 16, 8]


def test_a_run_that_does_not_validate_for_a_while_keeps_its_best(tmp_path: Path) -> None:
    saving = ("checkpoint.every=1", "checkpoint.keep=1")
    assert train(tmp_path, *options("train.steps=2", *saving), values=(0.1, 0.9, 0.2)) == 0
    assert kept(tmp_path)[1] == "step_000001"
    assert train(tmp_path, *options("train.steps=3", "validation.every=0", *saving)) == 0
    assert train(tmp_path, *options("train.steps=4", *saving), values=(0.1, 0.9, 0.2, 0.9, 0.3)) == 0
    assert kept(tmp_path) == (["step_000001", "step_000004"], "step_000001")


def test_other_problems_make_another_best(tmp_path: Path) -> None:
    saving = ("checkpoint.every=1", "checkpoint.keep=1")
    assert train(tmp_path, *options("train.steps=2", *saving), values=(0.1, 0.9, 0.2)) == 0
    assert kept(tmp_path)[1] == "step_000001"
    other = options("train.steps=4", "validation.samples=3", *saving)
    assert train(tmp_path, *other, values=(0.1, 0.9, 0.2, 0.4, 0.3)) == 0
    assert kept(tmp_path) == (["step_000003", "step_000004"], "step_000003")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "1+1=?", "answer": "\\\\frac{1}{"}\n', "validation.data: .*gold answers that are not right"),
        ("", "validation.data: no usable problem"),
        ('{"prompt": "1+1=?"}\n' * 3, "validation.data: no usable problem"),
    ],
)
def test_bad_problems_are_refused_before_the_start(lines: str, message: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(lines)
    with pytest.raises(Exception, match=message):
        whole_run.train(tmp_path, GRPO, *options(f'validation.data="{bad}"'))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def answer(outcome: str, length: int = 4, truncated: bool = False) -> Answer:
    return Answer(Reward(0.0, outcome), length, truncated)


def test_shares_are_means_over_problems() -> None:
    """By hand: 1 and 0 of two right, and 2 of two in the other kind."""
    problems = [Problem("1", "", "", kind="a/b"), Problem("2", "", "", kind="a/b"), Problem("3", "", "", "math")]
    asked = [Asked("one", number, problem, ()) for number, problem in enumerate(problems)]
    right, wrong = answer("correct"), answer("no_answer", length=10, truncated=True)
    found = summarise(asked, [[wrong, right], [wrong, wrong], [right, right]], [True, False, True])
    assert found == pytest.approx(
        {
            "validation/avg": 0.5,
            "validation/pass": 2 / 3,
            "validation/maj": 2 / 3,
            "validation/avg/a-b": 0.25,
            "validation/pass/a-b": 0.5,
            "validation/maj/a-b": 0.5,
            "validation/avg/math": 1.0,
            "validation/pass/math": 1.0,
            "validation/maj/math": 1.0,
            "validation/length": 7.0,
            "validation/truncated": 0.5,
        }
    )
    assert not [name for name in summarise(asked[:2], [[right], [wrong]], [True, False]) if name.count("/") > 1]


def test_of_several_files_the_whole_is_the_mean_of_theirs() -> None:
    """By hand: 1 of 2 and 0 of 2 right in the one file, 2 of 2 in the other; kinds count no more."""
    problems = [("aime24", "a"), ("aime24", "b"), ("math500", "a")]
    asked = [Asked(file, 0, Problem("1", "", "", kind=kind), ()) for file, kind in problems]
    right, wrong = answer("correct"), answer("no_answer")
    found = summarise(asked, [[wrong, right], [wrong, wrong], [right, right]], [False, False, True])
    assert found["validation/avg/aime24"] == 0.25 and found["validation/avg/math500"] == 1.0
    assert (found["validation/avg"], found["validation/pass"], found["validation/maj"]) == (0.625, 0.75, 0.5)
    assert {name for name in found if name.count("/") > 1} == {
        f"validation/{name}/{file}" for name in ("avg", "pass", "maj") for file in ("aime24", "math500")
    }


def test_files_are_validated_as_they_would_be_alone(tmp_path: Path) -> None:
    rows = problems().read_text().splitlines(keepends=True)
    files = [tmp_path / name for name in ("sums.jsonl", "countdowns.jsonl")]
    for path, part in zip(files, (rows[:8], rows[8:]), strict=True):
        path.write_text("".join(part))
    named = {"alone": f'"{files[1]}"', "both": json.dumps([str(path) for path in files])}
    for name, data in named.items():
        assert whole_run.train(tmp_path / name, GRPO, *options(f"validation.data={data}", every=2)) == 0
    alone, both = (validated(tmp_path / name) for name in named)
    assert [each["validation/avg/countdowns"] for each in both] == [each["validation/avg"] for each in alone]
    for each in both:
        means = [each[f"validation/avg/{name}"] for name in ("sums", "countdowns")]
        assert each["validation/avg"] == pytest.approx(sum(means) / 2)


def test_of_equal_steps_the_first_is_best_and_step_0_never() -> None:
    config = Config.model_validate({"validation": {"every": 1, "data": "x", "metric": "maj"}})
    validation, best = Validation(config), []
    for step, value in enumerate((0.9, 0.0, 0.4, 0.4, 0.3, 0.5)):
        validation.take(step, {"validation/avg": 1 - value, "validation/pass": 0.0, "validation/maj": value})
        best.append(validation.best_step)
    assert best == [None, 1, 2, 2, 2, 5] and validation.best_value == 0.5
    other = Validation(config)
    assert other.load_state_dict(validation.state_dict()) is None
    assert (other.best_step, other.best_value, other.baseline) == (5, 0.5, validation.baseline)

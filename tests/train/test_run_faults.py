"""What a user's files can have wrong, found by whole runs on two ranks: the same ConfigError on each of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.types import Sample
from tests import gloo
from tests.train import whole_run

RECIPE = "siren/siren-tiny-cpu.toml"
BASE = whole_run.RECIPES / "tiny" / "base"


def edit(name: str, **changed: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | changed))

    return change


def shard(model: Path) -> None:
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda model: [path.unlink() for path in model.glob(pattern)].clear()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).write_text(text)].clear()


def config_error(rank: int, world: int, folder: Path, overrides: tuple[str, ...]) -> str:
    try:
        whole_run._rank(rank, world, folder, RECIPE, overrides, None)
    except ConfigError as error:
        return str(error)
    return "none"


def found(folder: Path, *overrides: str) -> str:
    """What every rank of two says."""
    whole_run.data()
    said = gloo.run(config_error, 2, folder, overrides)
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("config.json", architectures=["GPT2LMHeadModel"]), "model_type qwen2 is not supported"),
        (edit("config.json", rope_scaling={"rope_type": "yarn"}), "states 'default' and 'yarn' for rope_type"),
        (edit("config.json", vocab_size=11), "expected less than config.json's vocab_size 11"),
        (edit("config.json", intermediate_size=16), "the weights do not fit"),
        (edit("config.json", intermediate_size=2**31 - 2), "the weights do not fit"),  # found before it is built
        (shard, "the file is truncated"),
        (remove("*.safetensors"), "holds neither model.safetensors nor"),
        (write("tokenizer.json", "{}"), "cannot be loaded"),
        (write("chat_template.jinja", "{% for %}"), "chat template cannot be applied to problem"),
        (write("chat_template.jinja", "{{ raise_exception('no') }}"), "chat template cannot be applied to problem"),
    ],
)
def test_a_fault_of_the_model_directory(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in found(tmp_path / "runs", f'model.path="{tmp_path}/model"')


def test_what_a_run_cannot_go_on_from(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path, RECIPE, "checkpoint.every=2", world=2) == 0
    changed = found(tmp_path, "train.steps=3", "optimizer.lr=0.01")
    assert "optimizer.lr: checkpoint 0.0002, now 0.01" in changed and "schedule" not in changed
    reported = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(reported.splitlines(keepends=True)[0])
    assert "its last step is 1, but the checkpoint to go on from is of step 2" in found(tmp_path, "train.steps=3")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(reported)
    shard = next((tmp_path / "run" / "checkpoints" / "step_000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert shard.name in found(tmp_path, "train.steps=3")


def test_every_change_that_would_make_another_run_is_listed_and_others_are_not(tmp_path: Path, capfd) -> None:
    assert whole_run.train(tmp_path, RECIPE, world=2) == 0
    allowed = ("train.steps=3", "rollout.batch_size=8", "train.micro_batch_tokens=200", "reward.workers=1")
    forbidden = ("method.coef=0.5", "rollout.temperature=0.9", "train.seed=3")
    refused = found(tmp_path, *allowed, *forbidden, "parallel.tensor=2")
    assert [line.split(": ")[0].strip() for line in refused.splitlines()[1:]] == [
        *("method.coef", "rollout.temperature", "train.seed")
    ]
    assert "rollout.temperature: checkpoint 1.0, now 0.9" in refused
    capfd.readouterr()
    assert whole_run.train(tmp_path, RECIPE, *allowed, "parallel.tensor=2", world=2) == 0
    said = capfd.readouterr().out
    assert "resuming after step 2 of 3" in said and "weights and optimizer are resharded" in said
    assert [step["step"] for step in whole_run.steps(tmp_path)] == [1, 2, 3]


def test_a_run_whose_checkpoints_cannot_be_told_apart_never_begins_anew(tmp_path: Path, capfd) -> None:
    assert whole_run.train(tmp_path, RECIPE, world=2) == 0
    checkpoints, reported = tmp_path / "run" / "checkpoints", whole_run.steps(tmp_path)
    for tracker in (b"", b"\x00\xff", b"step_000099\n"):
        (checkpoints / "latest").write_bytes(tracker)
        capfd.readouterr()
        assert whole_run.train(tmp_path, RECIPE, world=2) == 0
        said = capfd.readouterr().out
        assert "resuming after step 2 of 2" in said and "looking through all checkpoints" in said
    for path in checkpoints.glob("step_*"):
        shutil.rmtree(path)
    assert "holds no valid checkpoint" in found(tmp_path)
    assert whole_run.steps(tmp_path) == reported


def test_samples_of_older_weights_and_of_a_wrong_number_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = HFEngine.generate

    def stale(self: HFEngine, *args: Any) -> list[Sample]:
        return [replace(each, weight_version=max(0, each.weight_version - 1)) for each in generate(self, *args)]

    for spoilt, message in (
        (stale, "RolloutError: rollout: samples of weight versions [0], expected 1 only"),
        (lambda *args: generate(*args)[1:], "shorter than argument 1"),
    ):
        folder = tmp_path / spoilt.__name__
        monkeypatch.setattr(HFEngine, "generate", spoilt)
        with pytest.raises(AssertionError, match=re.escape(message)):
            whole_run.train(folder, RECIPE)
        assert len(list((folder / "run").glob("checkpoints/step_000002"))) == 0


def test_more_steps_than_asked_for_is_done(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path, RECIPE, "train.steps=2", world=2) == 0
    before = whole_run.steps(tmp_path)
    assert whole_run.train(tmp_path, RECIPE, "train.steps=1", world=2) == 0
    assert whole_run.steps(tmp_path) == before

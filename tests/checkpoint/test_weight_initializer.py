"""A run that starts from a checkpoint is the run that starts from the same weights in a model directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint.best import mark
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from tests.train import whole_run
from tools import convert

BASE = whole_run.RECIPES / "tiny" / "base"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    assert convert.main(["from-hf", str(BASE), str(root)]) == 0
    return root / "step_000000"


@pytest.mark.parametrize(
    ("recipe", "world"), [("sent/sent-tiny-cpu.toml", 1), ("ppo/ppo-tiny-cpu.toml", 2)], ids=["reference", "critic"]
)
def test_a_run_starts_from_a_checkpoint_of_any_layout(recipe: str, world: int, weights: Path, tmp_path: Path) -> None:
    layout = (f"parallel.ranks_per_node={world}", f"parallel.tensor={world}")
    for name, options in (("path", ()), ("weights", (f'model.weights="{weights}"',))):
        assert whole_run.train(tmp_path / name, recipe, *layout, *options, world=world) == 0
    assert whole_run.metrics(tmp_path / "path") == whole_run.metrics(tmp_path / "weights")


def test_a_run_starts_from_the_best_checkpoint_of_another(weights: Path, tmp_path: Path) -> None:
    """A copy of its one checkpoint is the best; the run keeps which one that was, though ``best`` moves on."""
    root = tmp_path / "other" / "checkpoints"
    for step in (0, 10):
        shutil.copytree(weights, root / f"step_{step:06d}")
    mark(root, 0)
    recipe, best = "grpo/grpo-tiny-cpu.toml", f'model.weights="{root}/best"'
    assert whole_run.train(tmp_path, recipe, best, "train.steps=1") == 0
    mark(root, 10)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["model"]["weights"] == f"{root}/step_000000"
    assert load_config(whole_run.RECIPES / recipe, [best]).model.weights == f"{root}/step_000010"
    assert whole_run.train(tmp_path, recipe, best, "train.steps=2") == 0  # the run goes on from its own
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["weights"] == f"{root}/step_000000"
    shutil.rmtree(root / "step_000010")
    with pytest.raises(ConfigError, match="best names no checkpoint that is beside it; give a step_"):
        load_config(whole_run.RECIPES / recipe, [best])
    (root / "best").unlink()
    with pytest.raises(ConfigError, match=r"best is no checkpoint; .* where it was validated \(validation.every"):
        load_config(whole_run.RECIPES / recipe, [best])


def test_the_weights_of_another_vocabulary_are_refused(weights: Path, tmp_path: Path) -> None:
    """As of a model whose embeddings were resized: rows would be left out, or be zeros."""
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(AssertionError, match=r"embedding.word_embeddings.weight: found \[\d+, 128\], expected"):
        whole_run.train(
            tmp_path, "grpo/grpo-tiny-cpu.toml", f'model.path="{model}"', f'model.weights="{weights}"', "train.steps=1"
        )


def test_a_run_does_not_go_on_with_another_model(tmp_path: Path) -> None:
    """Of the same shapes, but other rotary embeddings."""
    recipe = "grpo/grpo-tiny-cpu.toml"
    assert whole_run.train(tmp_path, recipe, "train.steps=1") == 0
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    assert whole_run.train(tmp_path, recipe, "train.steps=2", f'model.path="{model}"') == 0  # it was moved
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0}))
    with pytest.raises(AssertionError, match=r"is not the checkpoint's model \(rope_theta .*, now 777.0\)"):
        whole_run.train(tmp_path, recipe, "train.steps=3", f'model.path="{model}"')


def test_a_damaged_or_absent_start_is_refused(weights: Path, tmp_path: Path) -> None:
    recipe = "grpo/grpo-tiny-cpu.toml"
    with pytest.raises(AssertionError, match="model.weights: .* is no checkpoint; give a step_"):
        whole_run.train(tmp_path, recipe, f'model.weights="{tmp_path}"')
    broken = tmp_path / weights.name
    broken.mkdir()
    for file in weights.iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= file.suffix == ".distcp"
        (broken / file.name).write_bytes(content)
    with pytest.raises(AssertionError, match=r"__0_0.distcp: expected sha256"):
        whole_run.train(tmp_path, recipe, f'model.weights="{broken}"')

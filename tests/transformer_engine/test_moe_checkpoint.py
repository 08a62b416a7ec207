"""A mixture of experts under Transformer Engine's layers: saved, resumed, exported without them, and trained from.

Its optimizer is Transformer Engine's too, whose state is laid out otherwise than torch's.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import warm
from tests.train import whole_run
from tests.transformer_engine.models import moe_of_16
from tests.transformer_engine.running import ROOT, inside

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"one rank": (1, {}), "EP 2": (2, {"expert": 2})}


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Any]]:
    root, (world, layout) = tmp_path_factory.mktemp("run"), LAYOUTS[request.param]
    return root, request.param, inside("save", world=world, path=str(moe_of_16()), layout=layout, root=str(root))


def test_it_resumes_bitwise(saved: tuple[Path, str, list[Any]]) -> None:
    root, name, ranks = saved
    world, layout = LAYOUTS[name]
    again = inside("resume", world=world, path=str(moe_of_16()), layout=layout, root=str(root))
    stored = load_file(moe_of_16() / "model.safetensors")
    for before, after in zip(ranks, again, strict=True):
        assert after.pop("refused") == [] and after == before
        assert before["optimizers"] == ["transformer_engine.pytorch.optimizers.fused_adam"]
        assert before["weights"] == {name: digest(value) for name, value in stored.items()}


def test_without_transformer_engine_it_is_exported_bitwise(saved: tuple[Path, str, list[Any]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.convert", "to-hf", str(saved[0]), str(tmp_path / "hf")]
    done = warm.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stored, exported = (load_file(path / "model.safetensors") for path in (moe_of_16(), tmp_path / "hf"))
    assert exported.keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in exported.items())


def test_without_transformer_engine_a_run_starts_from_it(saved: tuple[Path, str, list[Any]], tmp_path: Path) -> None:
    """A step from the checkpoint, beside a model directory of other weights, is one from the weights it was made of."""
    other, recipe, options = tmp_path / "other", "siren/siren-tiny-cpu.toml", ('model.dtype="float32"', "train.steps=1")
    shutil.copytree(moe_of_16(), other)
    stored = load_file(other / "model.safetensors")
    save_file({name: -value for name, value in stored.items()}, other / "model.safetensors", {"format": "pt"})
    [weights] = (saved[0] / "checkpoints").glob("step_*")
    assert whole_run.train(tmp_path / "a", recipe, *options, f'model.path="{moe_of_16()}"') == 0
    starting = (f'model.path="{other}"', f'model.weights="{weights}"')
    assert whole_run.train(tmp_path / "b", recipe, *options, *starting) == 0
    assert whole_run.metrics(tmp_path / "a") == whole_run.metrics(tmp_path / "b")


def digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()

"""A model family in a file beside the recipe: the command line trains, resumes, plans and exports its model by it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from tests import warm
from tools import convert, plan, train

ROOT = Path(__file__).parents[2]
BASE = ROOT / "recipes" / "tiny" / "base"
GUIDE = ROOT / "docs" / "adding-a-model.md"
SMALL = (
    *("rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2", "checkpoint.every=1"),
    *("parallel.tensor=1", "parallel.ranks_per_node=1", "log.trackers=[]"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral with the tiny model's tokenizer, the guide's family, and a recipe that names both."""
    path = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, max_position_embeddings=256, sliding_window=None, **sizes, **heads)
    MistralForCausalLM(config).save_pretrained(path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BASE / name, path / "model")
    (path / "own.py").write_text(GUIDE.read_text().split("```python\n")[1].split("```")[0] + 'OTHER = "no family"\n')
    (path / "own.toml").write_text(
        f'parent = "{ROOT}/recipes/tiny/tiny-cpu.toml"\nname = "own"\n[model]\npath = "{path}/model"\n'
        f'family = "own.py:MISTRAL"\n[method]\nname = "grpo"\n[log]\ndir = "{path}/runs"\n'
    )
    return path


def finish(folder: Path, *overrides: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tools.train", str(folder / "own.toml"), *SMALL, *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = warm.run(command, cwd=folder, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_a_model_of_the_users_own_family_is_trained_resumed_and_exported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    code, said = finish(folder, "train.steps=1")
    assert code == 0, said
    shutil.copy(folder / "own.py", folder / "changed.py")
    code, said = finish(folder, "train.steps=2", f"model.family={folder}/changed.py:MISTRAL")
    assert code == 2 and "model.family: checkpoint" in said and "restore these keys" in said, said
    code, said = finish(folder, "train.steps=2")
    assert code == 0 and "resuming after step 1 of 2" in said, said
    assert convert.main(["to-hf", str(folder / "runs" / "own"), str(folder / "exported")]) == 0
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "exported"))
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    assert any(not torch.equal(after[name].float(), before[name].float()) for name in before)


def test_its_model_is_planned_and_tried_without_gpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(folder / "own.toml"), *SMALL]) == 0
    assert train.main([str(folder / "own.toml"), *SMALL, "--dry-run"]) == 0, capsys.readouterr().out
    assert "MistralForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.py:MISTRA", "defines no MISTRA; did you mean MISTRAL?"),
        ("own.py:OTHER", "'no family', expected a megatron_ext.model.architectures.base.Family"),
        ("none.py:MISTRAL", "model.family: no such file:"),
    ],
)
def test_a_name_that_is_no_family_is_refused(
    folder: Path, name: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for command in (train.main, plan.main):
        assert command([str(folder / "own.toml"), *SMALL, f"model.family={name}"]) == 2
        assert message in capsys.readouterr().err

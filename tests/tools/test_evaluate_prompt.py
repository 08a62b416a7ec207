"""Which prompt a model is asked on: that of its card, read from the card that an export writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.manifest import Manifest
from megatron_ext.config.schema import Config, PromptConfig
from megatron_ext.config.shipped import RECIPES
from megatron_ext.rollout.base import Request
from megatron_ext.rollout.hf.engine import HFEngine
from tools.evaluate import main
from tools.evaluate.prompt import choose_prompt
from tools.model_card import model_card

BASE = RECIPES / "tiny" / "base"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The base model with the card of a run on the prompt ``1+`` problem ``+2``."""
    folder = tmp_path / "hf"
    shutil.copytree(BASE, folder)
    sections = {"model": {"path": str(BASE)}, "prompt": {"prefix": "1+", "suffix": "+2"}, "method": {"name": "grpo"}}
    found = Manifest(7, {}, {}, Config.model_validate(sections).model_dump(), "", {"torch": "2"})
    (folder / "README.md").write_text(model_card(tmp_path / "checkpoints" / "step_000007", found, source=BASE))
    return folder


def recipe(folder: Path) -> str:
    path = folder / "other.toml"
    path.write_text('[prompt]\nsuffix = "!"\n')
    return str(path)


def test_the_card_comes_first_then_the_recipe_then_the_suite(exported: Path, tmp_path: Path) -> None:
    suite = ("tiny", PromptConfig(suffix="?"))
    own = choose_prompt(exported, recipe=recipe(tmp_path), suite=suite)
    assert (own.prompt.prefix, own.prompt.suffix, own.source) == ("1+", "+2", "the model's card")
    assert [note.partition(": ")[2] for note in own.notes] == [
        f"asked on the prompt of the model's card; that of recipe {tmp_path / 'other.toml'} differs in prefix, suffix",
        "asked on the prompt of the model's card; that of suite tiny differs in prefix, suffix",
    ]
    of_recipe = choose_prompt(BASE, recipe=recipe(tmp_path), suite=suite)
    assert (of_recipe.prompt.suffix, of_recipe.notes) == ("!", ())
    assert choose_prompt(BASE, suite=suite).prompt.suffix == "?"
    assert choose_prompt(BASE).prompt == PromptConfig()


def test_options_win_and_are_said(exported: Path) -> None:
    chosen = choose_prompt(exported, given={"suffix": "+3", "prefix": "1+"})
    assert (chosen.prompt.prefix, chosen.prompt.suffix) == ("1+", "+3")
    assert chosen.source == "the model's card, changed by --suffix"
    assert chosen.notes == (f"{exported}: the prompt is not that of the model's card: --suffix '+3', not '+2'",)
    assert choose_prompt(BASE, given={"suffix": "+3"}).notes == ()


def test_the_model_reads_its_own_prompt(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    generate = HFEngine.generate

    def seen(engine: HFEngine, requests: Sequence[Request], *more: Any) -> Any:
        read.extend(engine.tokenizer.decode(request.prompt_ids).replace(" ", "") for request in requests)
        return generate(engine, requests, *more)

    monkeypatch.setattr(HFEngine, "generate", seen)
    (tmp_path / "one.jsonl").write_text('{"prompt": "3*4", "answer": "15"}\n')
    command = [str(exported), "--data", str(tmp_path / "one.jsonl"), "--samples", "1", "--max-response-tokens", "8"]
    assert main([*command, "--workers", "1", "--out", str(tmp_path / "e.json")]) == 0
    assert len(read) == 1 and "1+3*4+2" in read[0]
    prompt = json.loads((tmp_path / "e.json").read_text())["evaluation"]["prompt"]
    assert prompt == {
        **{"system": "", "prefix": "1+", "suffix": "+2", "template": "", "answer_format": "boxed"},
        "from": "the model's card",
    }

"""The card of an exported model, read back with the Hugging Face Hub's own library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from megatron_ext.checkpoint.manifest import Manifest
from megatron_ext.config.schema import Config
from megatron_ext.model.export import write_hf
from tests import tiny
from tools.model_card import model_card

BASE = Path(__file__).parents[2] / "recipes/tiny/base"


def manifest(**changed: Any) -> Manifest:
    method = {"name": "siren", "coef": 0.1}
    sections = {"name": "mine", "model": {"path": "somewhere", "hub": "Org/Base"}, "method": method} | changed
    return Manifest(7, {}, {}, Config.model_validate(sections).model_dump(), "", {"torch": "2"})


def read(text: str) -> ModelCard:
    card = ModelCard(text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()  # what the Hub would get
    return card


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "step_000007"


def test_the_card_says_what_the_weights_are(tmp_path: Path) -> None:
    metric = {"pass@1": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    evaluations = {"before": {"metrics": metric, "problems": []}, "after": {"metrics": {}, "problems": []}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluations))
    data, prompt = {"hub": "Org/Data"}, {"suffix": "\nThink: `x`."}
    card = read(model_card(checkpoint(tmp_path), manifest(data=data, prompt=prompt), source=tmp_path))
    assert card.data.to_dict() == {
        "base_model": "Org/Base",
        "datasets": ["Org/Data"],
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "prompt": Config.model_validate({"prompt": prompt}).prompt.model_dump(),
        "tags": ["reinforcement-learning", "siren"],
    }
    for text in (
        "`Org/Base` after 7 steps",
        '- method: `{"name": "siren", "coef": 0.1}`',
        "- licence: unknown: the base model's directory does not tell it; ask its publisher",
        "- trained with: torch 2",
        "| | before | after |",
        "| pass@1 | 50.0% (25.0% .. 75.0%) |  |",
        '"max_response_tokens": 3072',
    ):
        assert text in card.text, text
    untrained = read(model_card(tmp_path / "step_000000", replace(manifest(), step=0), source=tmp_path))
    assert "not trained" in untrained.text and untrained.data.get("prompt") is None
    assert untrained.data.get("base_model") == "Org/Base"


CARDS = {
    "its card": ("---\nlicense: mit\n---\n# x", (), {"license": "mit"}, "mit, as the base model's card says"),
    "its card and a name": (
        "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\nbase_model: a/b\n---\n",
        ("LICENSE", "NOTICE"),
        {"license": "other", "license_name": "qwen", "license_link": "LICENSE"},
        "qwen, as the base model's card says; its text is LICENSE",
    ),
    "a file alone": (
        None,
        ("LICENSE.txt",),
        {"license": "other", "license_name": "base-model", "license_link": "LICENSE.txt"},
        "that of the base model, whose text is LICENSE.txt",
    ),
    "a card without metadata": ("# x\nlicense: mit\n", (), {"license": "unknown"}, "ask its publisher"),
    "a card that is no YAML": ("---\na: [\n---\n", (), {"license": "unknown"}, "metadata that cannot be read"),
    "a card that is a list": ("---\n- a\n---\n", (), {"license": "unknown"}, "metadata that cannot be read"),
    "a licence of two lines": ("---\nlicense: |-\n  a\n  b: c\n---\n", (), {"license": "a\nb: c"}, "card says"),
    "a licence that is a number": ("---\nlicense: 3\n---\n", (), {"license": "unknown"}, "ask its publisher"),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_the_licence_is_the_base_models(name: str, tmp_path: Path) -> None:
    text, files, expected, words = CARDS[name]
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    for file in files:
        (tmp_path / file).write_text("terms")
    card = read(model_card(checkpoint(tmp_path), manifest(), source=tmp_path))
    found = card.data.to_dict()
    assert {key: value for key, value in found.items() if key.startswith("license")} == expected
    assert found["base_model"] == "Org/Base" and words in card.text


def test_licence_files_go_along(tmp_path: Path) -> None:
    _, source = tiny.hf_model("qwen2")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        if (source / name).is_file():
            (model / name).write_bytes((source / name).read_bytes())
    (model / "LICENSE").write_text("terms")
    (model / "NOTICE").write_text("notice")
    weights = [("a", torch.ones(2))]
    write_hf(tmp_path / "hf", weights, shapes={"a": (2,)}, dtype=torch.float32, source=model, card="é\ud800")
    assert (tmp_path / "hf" / "LICENSE").read_text() == "terms" and (tmp_path / "hf" / "NOTICE").read_text() == "notice"
    assert (tmp_path / "hf" / "README.md").read_text(encoding="utf-8") == "é?"


@pytest.mark.parametrize("hub", ["", "a sentence, not an id", "https://user:hunter2hunter2@host/Org/Base", "base"])
def test_only_an_id_on_the_hub_is_a_base_model(hub: str, tmp_path: Path) -> None:
    found = manifest(model={"path": "/models/somewhere", "hub": hub}, data={"hub": hub})
    card = read(model_card(checkpoint(tmp_path), found, source=tmp_path))
    assert not {"base_model", "datasets"} & card.data.to_dict().keys()
    assert "(no id on the Hugging Face Hub is known: model.hub)" in card.text
    assert "hunter2" not in str(card)


def test_secrets_are_redacted_and_a_name_cannot_add_metadata(tmp_path: Path) -> None:
    secret = "hf_" + "aB3" * 8
    method = {"name": "siren\nlicense: evil", "coef": 0.1, "api_key": "hunter2"}
    found = manifest(model={"path": f"/models/{secret}", "hub": f"Org/{secret}"}, method=method)
    text = model_card(checkpoint(tmp_path), found, source=tmp_path)
    assert secret not in text and "hunter2" not in text
    assert read(text).data.get("license") == "unknown" and read(text).data.get("tags") == [
        "reinforcement-learning",
        method["name"],
    ]


def test_the_tiny_base_states_its_licence() -> None:
    assert ModelCard.load(BASE / "README.md").data.get("license") == "apache-2.0"

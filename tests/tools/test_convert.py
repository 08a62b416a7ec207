"""Hugging Face -> Megatron checkpoint -> Hugging Face in one process; exports of runs of several layouts agree."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.model.export import write_hf
from tests import tiny, warm
from tools.convert import main, num_bytes

ROOT = Path(__file__).parents[2]
BASE = ROOT / "recipes" / "tiny" / "base"


def test_a_model_directory_returns_bitwise_and_loads_in_transformers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.convert", "from-hf", str(BASE), str(tmp_path / "megatron")]
    done = warm.run(command, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'megatron'}\n", done
    assert main(["to-hf", str(tmp_path / "megatron"), str(tmp_path / "hf")]) == 0
    stored, found = load_file(BASE / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert set(stored) == set(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([tokenizer.encode("9 5 1 > 44?")])
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(BASE)(ids).logits)
    card = ModelCard.load(tmp_path / "hf" / "README.md")
    assert (card.data.get("license"), card.data.get("library_name")) == ("apache-2.0", "transformers")
    assert f"The weights of `{BASE}`, not trained further." in card.text


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "qwen3_moe", "qwen3_moe_mixed"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_returns_bitwise_in_files_of_limited_size(kind: str, tied: bool, tmp_path: Path) -> None:
    _, path = tiny.hf_model(kind, tied)
    assert main(["from-hf", str(path), str(tmp_path / "megatron")]) == 0
    assert main(["to-hf", str(tmp_path / "megatron"), str(tmp_path / "hf"), "--max-shard-size", "20KB"]) == 0
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    stored = load_file(path / "model.safetensors")
    assert found.keys() == stored.keys() and all(torch.equal(found[name], value) for name, value in stored.items())
    assert len(files) > 5 and all(file.stat().st_size < 25_000 for file in files)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def bad_input(tmp_path: Path, name: str) -> tuple[list[str], str]:
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    convert_to = ["from-hf", str(model), str(tmp_path / "out")]
    weights = load_file(model / "model.safetensors")
    if name == "cut":
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[:-1])
        return convert_to, "model.safetensors: found"
    if name == "renamed":
        save_file({f"{key}x": value for key, value in weights.items()}, model / "model.safetensors")
        return convert_to, "missing tensor model.norm.weight"
    if name == "rope":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn"}}))
        return convert_to, "states 'default' and 'yarn' for rope_type"
    if name == "other model":
        assert main(convert_to) == 0
        _, other = tiny.hf_model("qwen3")
        return [
            "to-hf",
            str(tmp_path / "out"),
            str(tmp_path / "hf"),
            "--model",
            str(other),
        ], "found [4, 128], expected [4"
    if name == "another head":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        return convert_to, "lm_head.weight is another tensor than model.embed_tokens.weight"
    if name == "no run":
        return ["to-hf", str(tmp_path / "runs" / "none"), str(tmp_path / "hf"), "--best"], "none: no such folder"
    if name == "not validated":
        (tmp_path / "best" / "checkpoints").mkdir(parents=True)  # a run of this name is no marker
        return ["to-hf", str(tmp_path / "best"), str(tmp_path / "hf"), "--best"], "holds no best checkpoint"
    if name == "a run called step":
        (tmp_path / "step_size_3e-6" / "checkpoints").mkdir(parents=True)
        return ["to-hf", str(tmp_path / "step_size_3e-6"), str(tmp_path / "hf")], "step_size_3e-6: holds no checkpoint"
    if name == "no model":
        return ["from-hf", str(tmp_path / "none"), str(tmp_path / "out")], "holds no config.json"
    if name == "no checkpoint":
        return ["to-hf", str(tmp_path), str(tmp_path / "out")], "holds no checkpoint"
    if name == "a file":
        return [*convert_to[:2], str(model / "config.json")], "is not empty, or no directory"
    if name == "not writable":
        return [*convert_to[:2], "/dev/null/out"], "Not a directory"
    return ["from-hf", str(BASE), str(BASE)], "exists and is not empty"


@pytest.mark.parametrize(
    "name",
    [
        *("cut", "renamed", "rope", "other model", "another head", "no run", "not validated", "a run called step"),
        *("no model", "no checkpoint", "not empty", "a file", "not writable"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = bad_input(tmp_path, name)
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_size_is_read_or_explained() -> None:
    assert [num_bytes(text) for text in ("500MB", "4GiB", "1.5 kb", "17")] == [500_000_000, 4 * 2**30, 1500, 17]
    for text in ("0MB", "4 giga", "-1", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 500MB or 4GiB"):
            num_bytes(text)


def test_the_export_states_the_dtype_of_its_weights(tmp_path: Path) -> None:
    weights = [("model.norm.weight", torch.ones(4, dtype=torch.bfloat16))]
    write_hf(tmp_path / "hf", weights, shapes={"model.norm.weight": (4,)}, dtype=torch.bfloat16, source=BASE, card="")
    assert json.loads((BASE / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_shards_are_limited_and_indexed(tmp_path: Path) -> None:
    weights = load_file(BASE / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    options: dict[str, Any] = {"shapes": shapes, "dtype": torch.float32, "source": BASE, "card": "card"}
    total = write_hf(tmp_path / "hf", weights.items(), **options, shard_bytes=500_000)
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    largest = max(tensor.nbytes for tensor in weights.values())
    assert len(files) > 2 and all(file.stat().st_size < max(500_000, largest) + 20_000 for file in files)
    assert total == sum(tensor.nbytes for tensor in weights.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_a_stream_that_is_not_what_was_announced_leaves_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shapes": {"a": (2,), "b": (3,)}, "dtype": torch.float32, "source": BASE, "card": ""}
    a, b, c = ("a", torch.zeros(2)), ("b", torch.zeros(3)), ("c", torch.zeros(1))
    for stream, message in (
        ([a], r"expected b \[3\] torch.float32, found nothing"),
        ([a, b, c], "c follows the last tensor"),
        ([b, a], r"expected a \[2\] torch.float32, found b \[3\]"),
        ([a, ("b", torch.zeros(3).half())], r"found b \[3\] torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            write_hf(tmp_path / "hf", stream, **options)
        assert list(tmp_path.iterdir()) == []

"""Hugging Face -> Megatron checkpoint -> Hugging Face in one process; exports of runs of several layouts agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.model.export import write_hf

ROOT = Path(__file__).parents[2]
BASE = ROOT / "recipes" / "tiny" / "base"


def convert(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "tools.convert", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_model_directory_returns_bitwise_and_loads_in_transformers(tmp_path: Path) -> None:
    code, output = convert("from-hf", BASE, tmp_path / "megatron")
    assert code == 0, output
    code, output = convert("to-hf", tmp_path / "megatron", tmp_path / "hf")
    assert code == 0, output
    stored, found = load_file(BASE / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert set(stored) == set(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([tokenizer.encode("9 5 1 > 44?")])
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(BASE)(ids).logits)


def test_bad_input_is_named(tmp_path: Path) -> None:
    for arguments, message in (
        (("to-hf", tmp_path, tmp_path / "out"), "holds no checkpoint"),
        (("from-hf", tmp_path / "none", tmp_path / "out"), "holds no config.json"),
        (("from-hf", BASE, BASE), "exists and is not empty"),
    ):
        code, output = convert(*arguments)
        assert code == 2 and message in output, output


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

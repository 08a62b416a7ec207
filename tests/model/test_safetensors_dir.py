"""Everything wrong with a model directory is named; what is right is read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.model import architectures
from megatron_ext.model.hf_weights import open_weights
from megatron_ext.model.safetensors_dir import INDEX, SafetensorsDir
from tests import tiny

UP, OUT = "model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model in two files with an index."""
    _, path = tiny.hf_model()
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    write(tmp_path, load_file(path / "model.safetensors"))
    return tmp_path


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    names = sorted(weights)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    of = {name: file for file, part in halves.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": of}))


def faults(folder: Path) -> str:
    architecture = architectures.read_architecture(json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError) as caught:
        open_weights(folder, architecture)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda w: w.pop(UP), [f"missing tensor {UP}"]),
        (lambda w: w.update({"model.extra": torch.zeros(2)}), ["unexpected tensor model.extra"]),
        (lambda w: w.update({"model.up": w.pop(UP)}), [f"missing tensor {UP}", "unexpected tensor model.up"]),
        (lambda w: w.update({OUT: torch.zeros(32, 16)}), [f"{OUT}: found shape [32, 16], expected [32, 64]"]),
        (lambda w: w.update({OUT: w[OUT].half()}), [f"{OUT}: found F16, expected F32, config.json's dtype"]),
        (lambda w: w.update({UP: w[UP].int()}), [f"{UP}: found I32, expected F32"]),
        (
            lambda w: w.update({name: value.bfloat16() for name, value in w.items()}),
            ["all 51 tensors: found BF16, expected F32, config.json's dtype"],
        ),
        (lambda w: (w.pop(UP), w.pop(OUT)), [f"missing tensor {UP}", f"missing tensor {OUT}"]),
    ],
)
def test_every_misfit_is_named(model: Path, change: Change, messages: list[str]) -> None:
    weights = load_file(model / "a.safetensors") | load_file(model / "b.safetensors")
    change(weights)
    write(model, weights)
    found = faults(model)
    assert all(message in found for message in messages), found
    assert len(found.splitlines()) == 1 + len(messages)


def test_a_file_at_fault_is_named(model: Path) -> None:
    content = (model / "b.safetensors").read_bytes()
    for broken, message in (
        (
            content[:-100],
            f"b.safetensors: found {len(content) - 100} bytes, expected {len(content)}: the file is truncated",
        ),
        (content + b"0", "the file is too long"),
        (content[:3], "b.safetensors: is truncated or no safetensors file"),
        (b"\xff" * 200, "b.safetensors: is truncated or no safetensors file"),
        (content[:8] + b"{" * (len(content) - 8), "b.safetensors: "),
    ):
        (model / "b.safetensors").write_bytes(broken)
        found = faults(model)
        assert message in found and len(found.splitlines()) == 2, found
    (model / "b.safetensors").unlink()
    assert "b.safetensors: [Errno 2] No such file" in faults(model)
    (model / INDEX).write_text("{}")
    assert f"{INDEX}: is no index" in faults(model)
    (model / INDEX).unlink()
    assert "holds neither model.safetensors nor" in faults(model)


def test_without_a_stated_dtype_all_tensors_must_agree(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    weights = load_file(model / "a.safetensors") | load_file(model / "b.safetensors")
    write(model, {name: value.double() if name == UP else value for name, value in weights.items()})
    assert f"{UP}: found F64, expected F32, what most tensors have (b.safetensors)" in faults(model)
    write(model, {name: value.int() for name, value in weights.items()})
    assert "all 51 tensors: found I32, expected a floating dtype" in faults(model)


def test_slices_of_a_tensor_are_read_from_its_file(model: Path) -> None:
    stored = SafetensorsDir(model)
    full = (load_file(model / "a.safetensors") | load_file(model / "b.safetensors"))[OUT]
    stored_tensor = stored.tensor(OUT)
    assert stored_tensor.shape == (32, 64) and stored.dtype == torch.float32
    assert torch.equal(stored_tensor[:], full)
    assert torch.equal(stored_tensor[4:9], full[4:9])
    assert torch.equal(stored_tensor[:, 16:32], full[:, 16:32])

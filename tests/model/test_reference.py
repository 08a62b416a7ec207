"""The reference model: there while it is used, only if it is asked for, and the same after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.model.reference import SLICE_BYTES, Reference, identity
from megatron_ext.train import models
from tests.train import whole_run

SENT, GRPO = "sent/sent-tiny-cpu.toml", "grpo/grpo-tiny-cpu.toml"


class Pretend:
    """A policy of two modules, for what does not depend on the model."""

    def __init__(self) -> None:
        self.modules = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)]


def test_weights_are_on_the_device_only_while_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy stands for the GPU's memory."""
    monkeypatch.setattr("megatron_ext.model.reference.upload", lambda weight, device: weight.clone())
    policy: Any = Pretend()
    parameters = [p for module in policy.modules for p in module.parameters()]
    before, homes = [p.detach().clone() for p in parameters], [p.data_ptr() for p in parameters]
    reference = Reference(policy, device=torch.device("cpu"), offload=True)
    for _ in range(2):
        with reference.present() as present:
            assert present is policy
            assert all(p.data_ptr() != home for p, home in zip(parameters, homes, strict=True))
            assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        assert [p.data_ptr() for p in parameters] == homes  # nothing is copied back
    with pytest.raises(RuntimeError, match="inside"), reference.present():
        raise RuntimeError("inside")
    assert [p.data_ptr() for p in parameters] == homes


def test_without_offload_and_on_the_host_nothing_moves() -> None:
    for offload in (False, True):
        policy: Any = Pretend()
        homes = [p.data_ptr() for module in policy.modules for p in module.parameters()]
        with Reference(policy, device=torch.device("cpu"), offload=offload).present() as present:
            assert [p.data_ptr() for module in present.modules for p in module.parameters()] == homes


def test_it_is_built_only_for_a_method_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a reference was built")

    monkeypatch.setattr(models, "build_reference", refuse)
    assert whole_run.train(tmp_path, GRPO, "train.steps=1") == 0
    with pytest.raises(AssertionError, match="a reference was built"):
        whole_run.train(tmp_path / "sent", SENT, "train.steps=1")


def test_a_resumed_run_keeps_its_reference_and_refuses_another(tmp_path: Path) -> None:
    """Offloading changes nothing; the model directory may move, its weights may not change."""
    assert whole_run.train(tmp_path, SENT, "train.steps=1", "model.offload_reference=true") == 0
    model = tmp_path / "elsewhere"
    shutil.copytree(whole_run.RECIPES / "tiny" / "base", model)
    moved = (f'model.path="{model}"', "train.steps=2")
    assert whole_run.train(tmp_path, SENT, *moved) == 0
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(AssertionError, match="the reference model is not the checkpoint's"):
        whole_run.train(tmp_path, SENT, *moved, "train.steps=3")


@pytest.mark.parametrize("place", [0, 100_000, 199_999])
def test_the_identity_of_weights(place: int, tmp_path: Path) -> None:
    content = bytearray(200_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    before = identity(tmp_path)
    assert identity(tmp_path) == before
    content[place] = 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert identity(tmp_path) != before
    (tmp_path / "small.safetensors").write_bytes(b"x" * (SLICE_BYTES // 2))
    assert len({before, identity(tmp_path)}) == 2

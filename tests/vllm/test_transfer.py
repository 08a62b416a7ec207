"""How a worker confirms what came by NCCL: vLLM's own receiver, with a stand-in for the group."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.rollout.checksum import Checksum
from megatron_ext.rollout.vllm.weight_transfer import ConfirmedNCCLTransfer, Received, confirmation

SENT = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}


class Model:
    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loaded |= {name: value.clone() for name, value in weights}


def receive(tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[ConfirmedNCCLTransfer, Model]:
    """A worker that was told of SENT and got ``tensors``."""
    left = iter(tensors)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    engine = ConfirmedNCCLTransfer.__new__(ConfirmedNCCLTransfer)  # its making needs an engine of vLLM
    model: Any = Model()
    engine.model, engine.device, engine.packed = model, torch.device("cpu"), False
    engine.model_update_group = SimpleNamespace(broadcast=lambda into, src, stream: into.copy_(next(left)))
    engine.received = Received("key")
    names = {"names": list(SENT), "dtype_names": [str(value.dtype)[6:] for value in SENT.values()]}
    shapes = {"shapes": [list(value.shape) for value in SENT.values()]}
    engine.receive_weights(engine.parse_update_info(names | shapes))
    assert engine.model is model
    return engine, model


def checksum() -> str:
    found = Checksum("key")
    for name, value in SENT.items():
        found.add(name, value)
    return found.digest()


def test_what_was_sent_is_loaded_and_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = receive(list(SENT.values()), monkeypatch)
    assert all(torch.equal(model.loaded[name], value) for name, value in SENT.items())
    with pytest.raises(ValueError, match="has not confirmed"):
        engine.finish_weight_update()
    engine.receive_weights(engine.parse_update_info(confirmation(checksum())))
    assert engine.received.confirmed


def test_other_weights_are_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = receive([SENT["a"], SENT["b"] * 1.01], monkeypatch)
    with pytest.raises(ValueError, match=f"received checksum .*the trainer sent {checksum()}"):
        engine.receive_weights(engine.parse_update_info(confirmation(checksum())))
    with pytest.raises(ValueError, match="has not confirmed"):
        engine.finish_weight_update()

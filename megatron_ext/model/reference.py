"""The reference model of a KL term: frozen weights, on the device all the time or only while they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.model.build import Policy

SLICES, SLICE_BYTES = 64, 4096


class Reference:
    """A frozen policy. With ``offload`` its weights live in host memory and are on ``device`` inside ``present`` only.

    Buffers (rotary frequencies) are small and stay where they are. Where ``device`` is the host nothing moves.
    """

    def __init__(self, policy: Policy, *, device: torch.device, offload: bool) -> None:
        self.policy, self.device = policy, device
        self._parameters = [p for module in policy.modules for p in module.parameters()] if offload else []
        for parameter in self._parameters:
            home = parameter.data.to("cpu")
            parameter.data = home.pin_memory() if device.type == "cuda" else home

    @contextmanager
    def present(self) -> Iterator[Policy]:
        """The policy with its weights on the device. They are frozen, so leaving copies nothing back."""
        homes = [parameter.data for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.data = upload(parameter.data, self.device)
            yield self.policy
        finally:
            for parameter, home in zip(self._parameters, homes, strict=True):
                parameter.data = home

    def become(self, policy: Policy) -> None:
        """Take over the weights of ``policy``, which has the same parts on this rank, wherever one's own lie."""
        for frozen, live in zip(self.policy.modules, policy.modules, strict=True):
            for own, new in zip(frozen.parameters(), live.parameters(), strict=True):
                own.data.copy_(new.data)


def upload(weight: Tensor, device: torch.device) -> Tensor:
    return weight.to(device, non_blocking=True)


def identity(model_path: str | Path) -> str:
    """What tells one model directory's weights from another's without reading all of them.

    A hash of each safetensors file's name and size and of slices of it, evenly spaced from its header to its end.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(model_path).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for number in range(SLICES):
                file.seek(max(0, size - SLICE_BYTES) * number // (SLICES - 1))
                digest.update(file.read(SLICE_BYTES))
    return digest.hexdigest()

"""Which experts a model of transformers chose, read from its own routers while it generates."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor


class RoutingRecorder:
    """Within, every forward of ``model`` on ``batch`` sequences adds the experts of its tokens.

    Raises ValueError for a model without routers that can be read: the ``gate`` of a layer's MLP, which returns logits,
    gate values and experts.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self.batch = batch
        layers = model.model.layers
        gates = {number: getattr(layer.mlp, "gate", None) for number, layer in enumerate(layers)}
        self._gates: dict[int, Any] = {number: gate for number, gate in gates.items() if gate is not None}
        if not self._gates:
            raise ValueError(
                f"rollout.routing_replay: {type(model).__name__} of transformers has no router (mlp.gate of a layer) "
                "whose experts could be read; set rollout.routing_replay = false"
            )
        self._num_layers = len(layers)
        num_experts = max(gate.num_experts for gate in self._gates.values())
        self._dtype = np.uint8 if num_experts <= 256 else np.uint16
        self._found: dict[int, list[np.ndarray]] = {number: [] for number in self._gates}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [gate.register_forward_hook(self._reader(number)) for number, gate in self._gates.items()]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def experts(self) -> np.ndarray:
        """``[batch, tokens, layers, top_k]`` of all tokens read, padding included; zeros in layers without experts."""
        read = {number: np.concatenate(parts, axis=1) for number, parts in self._found.items()}
        nothing = np.zeros_like(next(iter(read.values())))
        return np.stack([read.get(number, nothing) for number in range(self._num_layers)], axis=2)

    def _reader(self, number: int) -> Any:
        def read(gate: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            experts = output[2].reshape(self.batch, -1, output[2].shape[-1])
            self._found[number].append(experts.cpu().numpy().astype(self._dtype))

        return read

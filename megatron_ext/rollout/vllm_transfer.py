"""How a vLLM worker takes new weights where NCCL does not serve: backends registered with vLLM's own factory.

    in_process   the weights themselves, handed over inside one process (rollout/vllm_colocated.py)
    inline       base64 in the HTTP request: servers on a machine without NCCL (rollout/vllm_server.py)

vLLM imports this file in each of its workers: ``register`` is the entry point ``vllm.general_plugins`` of this package.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

IN_PROCESS, INLINE = "in_process", "inline"
CHUNK_BYTES = 64 * 2**20  # tensors of one inline request together, unless a single one is larger


Update = TypeVar("Update", bound=WeightTransferUpdateInfo)


@cache
def register() -> None:
    """Make both backends known to vLLM in this process."""
    WeightTransferEngineFactory.register_engine(IN_PROCESS, InProcessTransfer)
    WeightTransferEngineFactory.register_engine(INLINE, InlineTransfer)
    WeightTransferTrainerFactory.register_engine(INLINE, InlineTrainer)


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


class Transfer(WeightTransferEngine[NoInit, Update], Generic[Update]):
    """Loads checkpoint-format tensors layer by layer: each layer is processed for its kernels when it is complete.

    ``finish_weight_update`` raises ValueError naming the parameters that no tensor has filled.
    """

    init_info_cls = NoInit

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self.missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.missing -= self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.missing:
            raise ValueError(f"update_weights: the stream left out {', '.join(sorted(self.missing))}")

    def shutdown(self) -> None:
        pass


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    weights: Iterable[tuple[str, Tensor]]


class InProcessTransfer(Transfer[InProcessUpdate]):
    """Takes the trainer's stream as it is."""

    update_info_cls = InProcessUpdate

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        self.load(update_info.weights)


@dataclass
class InlineUpdate(WeightTransferUpdateInfo):
    """Some tensors: names, torch dtypes without ``torch.``, shapes, and their bytes in base64."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    data: list[str]


class InlineTransfer(Transfer[InlineUpdate]):
    """Takes tensors out of the request."""

    update_info_cls = InlineUpdate

    def receive_weights(self, update_info: InlineUpdate) -> None:
        self.load(self._tensors(update_info))

    @staticmethod
    def _tensors(update: InlineUpdate) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, data in zip(update.names, update.dtype_names, update.shapes, update.data, strict=True):
            raw = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=getattr(torch, dtype))
            yield name, raw.view(shape)


@dataclass
class InlineTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = INLINE


class InlineTrainer(TrainerWeightTransferEngine[InlineTrainerInit]):
    """The trainer's side of ``inline``: rank 0 sends chunks of whole tensors, all ranks gather them."""

    init_info_cls = InlineTrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: InlineTrainerInit, *, client: Any, source: WeightSource | None = None
    ) -> InlineTrainer:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            client.init_weight_transfer_engine({})
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        for chunk in _chunks(self.source):
            self.client.update_weights(
                {
                    "names": [name for name, _ in chunk],
                    "dtype_names": [str(value.dtype).removeprefix("torch.") for _, value in chunk],
                    "shapes": [list(value.shape) for _, value in chunk],
                    "data": [_encoded(value) for _, value in chunk],
                }
            )
        self.client.finish_weight_update()


def _chunks(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, value in weights:
        if chunk and size + value.nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, value))
        size += value.nbytes
    if chunk:
        yield chunk


def _encoded(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().view(-1)
    return base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode("ascii")

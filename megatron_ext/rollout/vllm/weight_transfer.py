"""How a vLLM worker takes new weights where NCCL does not serve: backends registered with vLLM's own factory.

    in_process       the weights themselves, handed over inside one process (rollout/vllm/engine.py)
    inline           base64 in the HTTP request: servers on a machine without NCCL (rollout/vllm_server/engine.py)
    confirmed_nccl   vLLM's own transfer by NCCL to servers

The two of servers take an update only with the trainer's checksum of it (rollout/checksum.py), sent last.

vLLM imports this file in each of its workers: ``register`` is the entry point ``vllm.general_plugins`` of this package.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Generic, TypeVar, cast

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
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_ext.rollout.checksum import Checksum

IN_PROCESS, INLINE, NCCL = "in_process", "inline", "confirmed_nccl"
CHUNK_BYTES = 64 * 2**20  # tensors of one inline request together, unless a single one is larger


Init = TypeVar("Init", bound=WeightTransferInitInfo)
Update = TypeVar("Update", bound=WeightTransferUpdateInfo)


@cache
def register() -> None:
    """Make the backends known to vLLM in this process."""
    WeightTransferEngineFactory.register_engine(IN_PROCESS, InProcessTransfer)
    WeightTransferEngineFactory.register_engine(INLINE, InlineTransfer)
    WeightTransferEngineFactory.register_engine(NCCL, ConfirmedNCCLTransfer)
    WeightTransferTrainerFactory.register_engine(INLINE, InlineTrainer)


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


class Transfer(WeightTransferEngine[Init, Update], Generic[Init, Update]):
    """Loads checkpoint-format tensors layer by layer: each layer is processed for its kernels when it is complete.

    ``finish_weight_update`` raises ValueError naming the parameters that no tensor has filled.
    """

    def init_transfer_engine(self, init_info: Init) -> None:
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


class InProcessTransfer(Transfer[NoInit, InProcessUpdate]):
    """Takes the trainer's stream as it is."""

    init_info_cls = NoInit
    update_info_cls = InProcessUpdate

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        self.load(update_info.weights)


def confirmation(digest: str) -> dict[str, Any]:
    """The last update of a stream: no tensors, and what their checksum must be."""
    return {"names": [], "dtype_names": [], "shapes": [], "checksum": digest}


class Received:
    """What a worker has received since the stream began, to be confirmed once before it is used."""

    def __init__(self, key: str) -> None:
        self.checksum, self.confirmed = Checksum(key), False

    def counted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            self.checksum.add(name, value)
            yield name, value

    def begin(self) -> None:
        self.checksum.clear()
        self.confirmed = False

    def confirm(self, digest: str) -> None:
        """Raise ValueError unless ``digest`` is that of what has arrived."""
        if self.checksum.digest() != digest:
            raise ValueError(f"update_weights: received checksum {self.checksum.digest()}, the trainer sent {digest}")
        self.confirmed = True

    def check(self) -> None:
        """Raise ValueError where the stream is not confirmed."""
        if not self.confirmed:
            raise ValueError("finish_weight_update: the trainer has not confirmed the checksum of what was received")


@dataclass
class InlineInit(WeightTransferInitInfo):
    checksum_key: str


@dataclass
class InlineUpdate(WeightTransferUpdateInfo):
    """Some tensors: names, torch dtypes without ``torch.``, shapes, and their bytes in base64; or ``confirmation``."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    data: list[str] = field(default_factory=list)
    checksum: str = ""


class InlineTransfer(Transfer[InlineInit, InlineUpdate]):
    """Takes tensors out of the request."""

    init_info_cls = InlineInit
    update_info_cls = InlineUpdate

    def init_transfer_engine(self, init_info: InlineInit) -> None:
        self.received = Received(init_info.checksum_key)

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.received.begin()

    def receive_weights(self, update_info: InlineUpdate) -> None:
        if update_info.checksum:
            self.received.confirm(update_info.checksum)
        else:
            self.load(self.received.counted(self._tensors(update_info)))

    def finish_weight_update(self) -> None:
        self.received.check()
        super().finish_weight_update()

    @staticmethod
    def _tensors(update: InlineUpdate) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, data in zip(update.names, update.dtype_names, update.shapes, update.data, strict=True):
            raw = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=getattr(torch, dtype))
            yield name, raw.view(shape)


@dataclass(kw_only=True)
class ConfirmedNCCLInit(NCCLWeightTransferInitInfo):
    checksum_key: str


@dataclass
class ConfirmedNCCLUpdate(NCCLWeightTransferUpdateInfo):
    """What will be broadcast; or ``confirmation``."""

    checksum: str = ""


class ConfirmedNCCLTransfer(NCCLWeightTransferEngine):
    """vLLM's own, which loads what it receives into ``self.model``: for that while, a model that counts it first."""

    init_info_cls = ConfirmedNCCLInit
    update_info_cls = ConfirmedNCCLUpdate

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        assert isinstance(init_info, ConfirmedNCCLInit)
        self.received = Received(init_info.checksum_key)
        super().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.received.begin()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        assert isinstance(update_info, ConfirmedNCCLUpdate)
        if update_info.checksum:
            return self.received.confirm(update_info.checksum)
        model = self.model
        self.model = cast(torch.nn.Module, CountingModel(model, self.received))
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        self.received.check()
        super().finish_weight_update()


@dataclass(frozen=True)
class CountingModel:
    model: Any
    received: Received

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self.model.load_weights(self.received.counted(weights))


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

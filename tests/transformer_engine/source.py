"""Transformer Engine's own Python, as released, on a machine without a GPU.

``make`` puts the pinned wheel, which holds all its Python sources, into ``SOURCE``. ``load`` imports them with its
compiled parts left out: the bindings ``transformer_engine_torch`` know their enumerations and refuse every kernel.
So its modules are built, filled, named, saved and asked, and never computed with. onnx, which it imports to export
models, is left out too.

Call ``load`` in a process of its own, before anything imports megatron: Megatron-Core then takes the same layers,
optimizer and attention as on a GPU, while ``cpu_compat.enter`` keeps their tensors on the CPU.
"""

from __future__ import annotations

import enum
import functools
import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

VERSION = "2.11.0"
CUDNN = 91400  # 9.14.0, as the bindings tell it
ENVIRONMENT = {"NVTE_PROJECT_BUILDING": "1"}  # its core library is not loaded
COMPUTE_CAPABILITY = {"major": 9, "minor": 0}
SOURCE = Path(__file__).parents[2] / "build" / "transformer-engine"


def available() -> bool:
    return (SOURCE / f"transformer_engine-{VERSION}.dist-info").is_dir()


class DType(enum.IntEnum):
    """Of transformer_engine.h; only that they differ matters."""

    kByte, kInt16, kInt32, kInt64, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = range(10)


class Bindings(ModuleType):
    """``transformer_engine_torch``: enumerations, with capitals, have members; the rest are kernels that no CPU has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = Members(name) if name[0].isupper() else _kernel(name)
        setattr(self, name, value)
        return value


class Members:
    """An enumeration whose members are made, and numbered, as they are asked for."""

    def __init__(self, name: str) -> None:
        self._enumeration = name
        self._members: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._members:
            enumeration: Any = enum.IntEnum(self._enumeration, {name: len(self._members)})
            self._members[name] = enumeration[name]
        return self._members[name]


def _kernel(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} is a kernel of a GPU")

    return refuse


@functools.cache
def load() -> Bindings:
    """Import the sources. For them alone there is a GPU, of ``COMPUTE_CAPABILITY``. Returns the bindings."""
    assert not any(name.startswith("megatron") for name in sys.modules)
    import torch

    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(SOURCE))
    for name in ("onnx", "onnxscript"):
        stand_in = mock.MagicMock(__spec__=ModuleSpec(name, None))
        sys.modules[name] = stand_in
    package = ModuleType("transformer_engine")  # long enough to reach its common part before the rest
    package.__path__ = [str(SOURCE / "transformer_engine")]
    sys.modules["transformer_engine"] = package
    common: Any = importlib.import_module("transformer_engine.common")
    bindings: Any = Bindings("transformer_engine_torch")
    bindings.DType = DType
    bindings.get_cudnn_version = lambda: CUDNN
    bindings.__all__ = ["get_cudnn_version"]  # what is taken by a star
    common.load_framework_extension = lambda _: sys.modules.update(transformer_engine_torch=bindings)
    del sys.modules["transformer_engine"]
    real = torch.cuda.is_available
    cuda: Any = torch.cuda
    cuda.is_available = lambda: _asked_by_transformer_engine() or real()
    cuda.get_device_properties = lambda _: SimpleNamespace(**COMPUTE_CAPABILITY)
    whole: Any = importlib.import_module("transformer_engine")
    whole.common = common
    assert whole.__version__ == VERSION
    return bindings


def _asked_by_transformer_engine() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("transformer_engine.")

"""What Megatron-Core does not find when it is imported: what this machine cannot use, and what it only looks for.

Megatron-Core decides while it is imported: where Transformer Engine and apex import it takes their optimizer, norms and
clipping, whose kernels refuse tensors on the CPU (and Transformer Engine's own import may fail without a driver). One
image serves GPU nodes and nodes without, and dry runs that hide the GPUs; without a GPU, Megatron-Core must choose
torch, and need not make torch's compiler ready for fused functions, which no layer of the CPU calls.

wandb and TensorBoard it imports wherever they are installed, for timers that are not used here. They are found again as
soon as it is imported: a run's trackers are none of its business.

``hide_from_megatron`` is called when ``megatron_ext`` is imported, so before anything of Megatron-Core. torch is only
imported, and asked for a GPU, when somebody imports one of the libraries, or Megatron-Core its compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

GPU_LIBRARIES = ("transformer_engine", "apex")
LOGGERS = ("wandb", "tensorboard")
COMPILER = "megatron.core.jit"  # what decorates the fused functions


def hide_from_megatron() -> None:
    """From now on, importing one of ``GPU_LIBRARIES`` without a GPU fails like that of a missing module, and so does
    that of ``LOGGERS`` by Megatron-Core; without a GPU its fused functions are not compiled."""
    sys.meta_path.insert(0, _Hidden())


class _Hidden(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == COMPILER:
            return _without_compiler(PathFinder.find_spec(fullname, path))
        for_gpus = fullname in GPU_LIBRARIES
        if not for_gpus and not (fullname in LOGGERS and _is_being_imported("megatron.core")):
            return None
        found = PathFinder.find_spec(fullname)
        if found is not None and for_gpus and _has_gpu():
            return _with_reason(found)
        return None if found is None else ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        why = "needs a GPU, and there is none" if module.__name__ in GPU_LIBRARIES else "is not for Megatron-Core"
        raise ModuleNotFoundError(f"{module.__name__} {why}", name=module.__name__)


def _with_reason(spec: ModuleSpec) -> ModuleSpec:
    """A library that is installed in part fails as a missing one does: Megatron-Core goes on, and the run says why."""

    def load(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        try:
            execute(module)
        except ImportError:
            raise
        except Exception as error:
            raise ImportError(f"{spec.name}: {type(error).__name__}: {error}", name=spec.name) from error

    return _loaded_by(load, spec)


def _without_compiler(spec: ModuleSpec | None) -> ModuleSpec | None:
    """Megatron-Core's compiler, turned off before anything is decorated with it."""

    def load(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        module.disable_jit_fuser()

    return spec if spec is None or _has_gpu() else _loaded_by(load, spec)


def _loaded_by(load: Callable[[Callable[[ModuleType], None], ModuleType], None], spec: ModuleSpec) -> ModuleSpec:
    """The spec with ``load`` around what executes its module. Its loader stays itself: packages ask it for files."""
    loader: Any = spec.loader
    loader.exec_module = partial(load, loader.exec_module)
    return spec


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)  # importlib's own mark of a module whose code has not run to its end


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

"""Transformer Engine and apex stay unseen where there is no GPU, whatever is installed.

Megatron-Core decides while it is imported: where these libraries import it takes their optimizer, norms and clipping,
whose kernels refuse tensors on the CPU (and Transformer Engine's own import may fail without a driver). One image
serves GPU nodes and nodes without, and dry runs that hide the GPUs; without a GPU, Megatron-Core must choose torch.

``hide_without_gpu`` is called when ``megatron_ext`` is imported, so before anything of Megatron-Core. torch is only
imported, and asked for a GPU, when somebody imports one of the libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

GPU_LIBRARIES = ("transformer_engine", "apex")


def hide_without_gpu() -> None:
    """From now on, importing one of ``GPU_LIBRARIES`` without a GPU fails like that of a missing module."""
    sys.meta_path.insert(0, _GpuLibraries())


class _GpuLibraries(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in GPU_LIBRARIES or PathFinder.find_spec(fullname) is None:
            return None
        import torch

        return None if torch.cuda.is_available() else ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError(f"{module.__name__} needs a GPU, and there is none", name=module.__name__)

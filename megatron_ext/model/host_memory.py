"""Room in host memory for copies: a checkpoint is written while training changes what it is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; at least the largest element


class HostMemory:
    """One block, allocated at the first use and kept; page-locked where there is a GPU: copies run at bus speed.

    Not torch's pinned allocator: that one rounds every request up to a power of two.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Flat copies, each in a storage of its own size, which replace those of the call before.

        Those of tensors on a GPU are complete when its current stream is.
        """
        starts = list(itertools.accumulate((-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in tensors), initial=0))
        if not self._block.numel() and starts[-1]:
            self._block = _page_locked(starts[-1])
        assert starts[-1] <= self._block.numel(), "what a rank owns does not grow"
        memory: Any = memoryview(cast(Any, self._block.numpy()))
        found = []
        for each, start in zip(tensors, starts[:-1], strict=True):
            copy = torch.frombuffer(memory, dtype=each.dtype, count=each.numel(), offset=start)
            found.append(copy.copy_(each.detach().reshape(-1), non_blocking=True))
        return found


def _page_locked(num_bytes: int) -> Tensor:
    block = torch.empty(num_bytes, dtype=torch.uint8)
    if torch.cuda.is_available():
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(block.data_ptr(), num_bytes, 0))
    return block

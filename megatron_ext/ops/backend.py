"""Which row work runs where: Triton kernels on a GPU, the portable torch path elsewhere. Decided once, and logged."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.ops import rows
from megatron_ext.ops.rows import RowGradient
from megatron_ext.ops.window import Window

log = logging.getLogger(__name__)


class RowWork(Protocol):
    """The two functions of rows.py and of kernels/rows.py."""

    def summarise(
        self, logits: Tensor, column: Tensor, scale: Tensor, real: int, **options: Any
    ) -> tuple[Tensor, Window | None]: ...

    def gradient(
        self, logits: Tensor, column: Tensor, scale: Tensor, real: int, row: RowGradient, out: Tensor
    ) -> None: ...


def row_work(logits: Tensor) -> RowWork:
    """fp64 is for checks: always the portable path."""
    return rows if logits.dtype == torch.float64 else decide(logits.device.type)  # pyright: ignore[reportReturnType]


@cache
def decide(device: str) -> RowWork:
    """The row work of a device type."""
    if device == "cuda" and importlib.util.find_spec("triton"):
        from megatron_ext.ops.kernels import rows as kernels

        log.info("policy statistics on %s: Triton kernels", device)
        return kernels  # pyright: ignore[reportReturnType]
    log.info("policy statistics on %s: portable torch path", device)
    return rows  # pyright: ignore[reportReturnType]

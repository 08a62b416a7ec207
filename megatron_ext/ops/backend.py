"""Who does the operators' work: Triton kernels on a GPU, torch elsewhere. Decided once for a device, and logged."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.ops import portable
from megatron_ext.ops.options import Forward, Options

log = logging.getLogger(__name__)


class Implementation(Protocol):
    """The two functions of portable.py and of kernels/implementation.py.

    ``logits`` ``[T, shard.width]`` with ``targets`` ``[T]`` int64 and ``scale`` ``[T, 1]``, 1 / temperature in the
    dtype of the arithmetic. ``forward`` may exchange over the shard's group, ``backward`` does not; it writes the
    gradient to ``out``, which may be ``logits``. The first axis of ``saved`` is that of ``logits``.
    """

    def forward(self, logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Forward: ...

    def backward(
        self,
        logits: Tensor,
        targets: Tensor,
        scale: Tensor,
        saved: tuple[Tensor, ...],
        upstream: Mapping[str, Tensor],
        options: Options,
        out: Tensor,
    ) -> None: ...


def implementation(logits: Tensor) -> Implementation:
    """fp64 is for checks: always torch's."""
    return portable if logits.dtype == torch.float64 else decide(logits.device.type)


@cache
def decide(device: str) -> Implementation:
    """The implementation for a device type."""
    if device == "cuda" and importlib.util.find_spec("triton"):
        from megatron_ext.ops.kernels import implementation as kernels

        log.info("policy statistics on %s: Triton kernels", device)
        return kernels
    log.info("policy statistics on %s: portable torch path", device)
    return portable

"""Where an optimizer's state lies: on the device while it is needed, else in page-locked host memory.

Megatron's own ``offload_to_cpu`` copies to pageable memory, allocated anew each time. And of an fp32 model it moves the
parameters themselves, which are parts of the buffer that the forward reads: they would come back as copies, and the
model would no longer follow its optimizer. Here what moves is the optimizer's alone: fp32 masters of 16-bit parameters
and the moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.model.host_memory import HostMemory


class OptimizerState:
    """The tensors of one Megatron optimizer, ``offload``ed to one block of host memory and ``restore``d from it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._memory = optimizer, HostMemory()

    def offload(self) -> None:
        """Move the state to host memory and free the device's; a first step's moments are made before."""
        allocate(self._optimizer)
        tensors = state_tensors(self._optimizer)
        copies = self._memory.copies(tensors)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # before anything is freed
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data = copy.view(tensor.shape)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Bring it back. The block is not written before the copies out of it are done: both are in one stream."""
        for tensor in state_tensors(self._optimizer):
            tensor.data = tensor.data.to(cpu_compat.device(), non_blocking=True, copy=True)


def state_tensors(optimizer: Any) -> list[Tensor]:
    """What an optimizer holds of its own: fp32 masters of 16-bit parameters, and the moments that exist so far."""
    found: list[Tensor] = []
    for part in sub_optimizers(optimizer):
        found += [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
        for state in part.optimizer.state.values():
            found += [value for name, value in state.items() if name != "step" and isinstance(value, Tensor)]
    return found


def sub_optimizers(optimizer: Any) -> list[Any]:
    """The distributed optimizers of which Megatron's one is made, those without a parameter on this rank left out."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def reset(optimizer: Any) -> None:
    """Moments of zero and no steps taken, wherever the state lies; masters stay: they are the weights."""
    allocate(optimizer)
    for part in sub_optimizers(optimizer):
        for state in part.optimizer.state.values():
            for name in state.keys() & {"exp_avg", "exp_avg_sq", "step"}:  # the last one: torch's
                state[name].zero_()
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # of the fused one


def allocate(optimizer: Any) -> None:
    """Give an optimizer that never stepped its zero state."""
    for part in sub_optimizers(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for moments in part.optimizer.state.values():
                moments.setdefault("step", torch.zeros((), dtype=torch.float32))

"""The critic: the policy's architecture, layout and first weights, with a value head for the output layer.

    v_s = w . h_s + b      h [S, D] after the final norm on the last pipeline stage, v in fp32

The head is replicated on every tensor-parallel rank and reads full hidden states, so its gradient is full as well, with
or without sequence parallelism: ranks agree without an all-reduce. It starts at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import functional as F

from megatron_ext import cpu_compat
from megatron_ext.model import context
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import OVERLAPPED, Overlap, Policy, build_modules, wrap
from megatron_ext.model.forward import run_pipeline, select_hidden
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.types import PackedSequences

ValueLoss = Callable[[int, Tensor], Tensor]  # (number of the micro-batch, its values [T]) -> scalar


class ValueHead(torch.nn.Linear):
    """``[..., D] -> [...]``, computed in fp32."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__(hidden_size, 1, device=cpu_compat.device(), dtype=dtype)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), self.bias.float())[..., 0]


def build_critic(
    architecture: Architecture,
    layout: ModelLayout,
    options: ModelOptions,
    *,
    fill: Callable[[list[GPTModel]], None],
    overlap: Overlap = OVERLAPPED,
) -> Policy:
    """This rank's part of the critic, ready for training. ``fill`` gives its modules the policy's first weights."""
    modules: list[Any] = list(build_modules(architecture, layout, options))
    fill(modules)
    for module in modules:
        if module.post_process:
            module.output_layer = ValueHead(architecture.hidden_size, module.config.params_dtype)
        module.share_embeddings_and_output_weights = False
    return wrap(architecture, modules, overlap)


def values(critic: Policy, packed: Sequence[PackedSequences]) -> list[Tensor] | None:
    """Without gradient: for each micro-batch the value ``[T]`` where each response token is predicted.

    On the last pipeline stage; None on the others.
    """
    with torch.no_grad():
        return run_pipeline(critic, packed, _reader(critic), loss=None)


def values_backward(critic: Policy, packed: Sequence[PackedSequences], loss: ValueLoss) -> list[Tensor] | None:
    """``values``, adding the gradient of the sum of all losses into Megatron's buffers (see ``forward_backward``)."""
    return run_pipeline(critic, packed, _reader(critic), loss)


def _reader(critic: Policy) -> Callable[[Tensor, PackedSequences], Tensor]:
    head: Any = critic.modules[-1]

    def read(output: Tensor, micro_batch: PackedSequences) -> Tensor:
        return context.whole(head.output_layer(select_hidden(critic, output, micro_batch)), micro_batch.context)

    return read

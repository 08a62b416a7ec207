"""The output layer multiplies the positions that predict a response token, and no others, and its logits exist once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import architectures, build, forward, parallel
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.train import packing
from megatron_ext.types import TokenStats
from tests import gloo, tiny

PROMPT, RESPONSE, SEQUENCES = 12, 10, 4  # more prompt than response
POSITIONS = SEQUENCES * RESPONSE
NEEDS = Needs(entropy=True, entropy_grad=True, nucleus_p=0.8, nucleus_grad=True)
LAYOUTS = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
]


class Products(TorchDispatchMode):
    """Matrix products with an operand or a result of the logits' width, in the order of their execution.

    For each the positions of its logits, and the storages of those logits: held, so that none is used twice.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.width, self.hidden_size = width, hidden_size
        self.positions: list[int] = []
        self.held: dict[int, Tensor] = {}
        self.scattered: list[int] = []  # positions of what is filled with zeros or copied at that width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm"):
            for tensor in (*args, result):
                self.note(tensor)
        at_width = isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] == self.width
        if at_width and name in ("index_select", "index_select_backward", "index_add_", "new_zeros", "zeros"):
            self.scattered.append(len(result))
        return result

    def note(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.ndim == 2 and self.width in tensor.shape:
            positions = next((n for n in tensor.shape if n != self.width), self.width)
            if positions != self.hidden_size:  # the weight itself and its gradient
                self.positions.append(positions)
                self.held[tensor.untyped_storage().data_ptr()] = tensor


def products(rank: int, world: int, path: str, layout: dict[str, Any], tied: bool) -> tuple[list[int], int, list[int]]:
    """Of one micro-batch: positions in each product, tensors of logits' width, and what was scattered."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_policy(architecture, ModelLayout(**layout), ModelOptions(torch.float32))
    for parameter in (p for module in policy.modules for p in module.parameters()):
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    draw = torch.Generator().manual_seed(3)
    sequences = [
        (torch.randint(tiny.VOCAB, (PROMPT,), generator=draw).tolist(), torch.randint(60, (RESPONSE,)).tolist())
        for _ in range(SEQUENCES)
    ]
    micro_batch = packing.pack(sequences, multiple=layout.get("tensor", 1))

    def loss(_: int, stats: TokenStats) -> Tensor:
        assert stats.entropy is not None and stats.nucleus_entropy is not None
        return (stats.logprob + stats.entropy + stats.nucleus_entropy).sum()

    with Products(policy.vocab_shard.width, architecture.hidden_size) as seen:
        forward.forward_backward(policy, [micro_batch], NEEDS, 1.0, loss)
    return seen.positions, len(seen.held), seen.scattered


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_only_response_rows_are_multiplied_and_their_gradient_takes_the_place_of_the_logits(
    layout: dict[str, Any], tied: bool
) -> None:
    _, path = tiny.hf_model("qwen2", tied)
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    found = gloo.run(products, world, str(path), layout, tied)
    for rank, (positions, tensors, scattered) in enumerate(found):
        last = rank >= world - layout.get("tensor", 1)
        # logits = hidden W^T, then d_hidden = d_logits W and d_W = d_logits^T hidden
        assert positions == [POSITIONS] * 3 * last
        assert tensors == last
        assert scattered == []

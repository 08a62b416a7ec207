"""Recomputed activations: the same gradients, and fewer tensors kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import architectures, build, forward, parallel
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.plan.memory import RECOMPUTE, saved_per_token
from megatron_ext.train import packing
from megatron_ext.types import TokenStats
from tests import gloo, tiny

TOKENS = 256


def gradients(rank: int, world: int, path: str, recompute: str) -> tuple[dict[str, Tensor], int]:
    """Every gradient of this rank, and the bytes of what its forward kept."""
    cpu_compat.enter()
    layout: dict[str, Any] = {"tensor": world, "sequence": world > 1}
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_policy(architecture, ModelLayout(**layout), ModelOptions(torch.float32, recompute))
    generator = torch.Generator().manual_seed(rank)
    for parameter in policy.modules[0].parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    micro_batch = packing.pack([([1] * 8, [60] * 9)] * (TOKENS // 16), multiple=world)
    kept: dict[int, Tensor] = {}  # held, so that no storage is used twice
    forward_kept = 0

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def loss(_: int, stats: TokenStats) -> Tensor:
        nonlocal forward_kept
        forward_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return (stats.logprob * torch.arange(len(stats.logprob))).sum()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward.forward_backward(policy, [micro_batch], Needs(), 1.0, loss)
    found = {name: vars(parameter)["main_grad"].clone() for name, parameter in policy.modules[0].named_parameters()}
    return found, forward_kept


@pytest.mark.parametrize("world", [1, 2])
def test_recomputing_changes_no_gradient_and_keeps_less(world: int) -> None:
    _, path = tiny.hf_model()
    a = architectures.read_architecture(read_hf_config(path))
    p = ParallelConfig(ranks_per_node=world, tensor=world, sequence=world > 1)
    runs = [gloo.run(gradients, world, str(path), mode) for mode in RECOMPUTE]
    for (plain, none), (with_mlp, mlp), (whole, full) in zip(*runs, strict=True):
        assert all(value.abs().max() > 0 for value in plain.values())
        assert all(
            torch.equal(with_mlp[name], value) and torch.equal(whole[name], value) for name, value in plain.items()
        )
        # what the planner counts for an MLP; the norm before it is part of its first layer there, and apart here; and
        # there is no copy of up here
        both = [saved_per_token(a, p, 0, recompute, fused_swiglu=False) for recompute in ("none", "mlp")]
        planned = both[0] - both[1]
        planned -= (a.hidden_size + a.ffn_size) / world
        assert (none - mlp) / (4 * TOKENS * a.num_layers) == planned
        assert full < mlp / 4

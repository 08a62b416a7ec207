"""Recomputed activations: the same gradients, and fewer tensors kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import host
from megatron_ext.methods.base import Needs
from megatron_ext.model import build, forward, hf_config
from megatron_ext.train import config as train_config
from megatron_ext.train import packing, parallel
from megatron_ext.train.config import ParallelConfig
from tests import gloo, tiny


def gradients(rank: int, world: int, path: str, recompute: str) -> tuple[dict[str, Tensor], int]:
    """Every gradient of this rank, and the bytes of what its forward kept."""
    host.enter()
    layout: dict[str, Any] = {"tensor": world, "sequence": world > 1}
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    architecture = hf_config.read_architecture(train_config.hf_config(path))
    policy = build.build_policy(architecture, dtype=torch.float32, recompute=recompute, **layout)
    generator = torch.Generator().manual_seed(rank)
    for parameter in policy.modules[0].parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    micro = packing.pack([(e.sample.prompt_ids, e.sample.response_ids) for e in tiny.episodes()], multiple=world)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward.forward_backward(policy, [micro], Needs(), 1.0, lambda _, stats: stats.logprob.sum())
    found = {name: vars(parameter)["main_grad"].clone() for name, parameter in policy.modules[0].named_parameters()}
    return found, sum(kept.values())


@pytest.mark.parametrize("world", [1, 2])
def test_recomputing_changes_no_gradient(world: int) -> None:
    _, path = tiny.hf_model()
    for kept in zip(*(gloo.run(gradients, world, str(path), mode) for mode in ("none", "mlp", "full")), strict=True):
        (plain, _), *others = kept
        assert all(value.abs().max() > 0 for value in plain.values())
        for found, _ in others:
            assert all(torch.equal(found[name], value) for name, value in plain.items())

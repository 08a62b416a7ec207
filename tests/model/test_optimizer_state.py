"""An offloaded optimizer lies in one block of host memory, comes back to the bit, and the model still follows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.model import build, parallel
from megatron_ext.model.architectures import read_architecture
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.model.optimizer_state import state_tensors
from megatron_ext.model.trainable import TrainableModel
from tests import gloo
from tests.ops.test_real_logits import BASE


def updates(rank: int, world: int, dtype: torch.dtype, offloaded: bool) -> dict[str, Any]:
    """Three updates with made-up gradients, the optimizer away in between; weights, state and where it lay."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    torch.manual_seed(1)
    model = build.build_policy(read_architecture(read_hf_config(BASE)), ModelLayout(), ModelOptions(dtype))
    for parameter in model.modules[0].parameters():
        parameter.data.normal_(std=0.02)
    each = TrainableModel.build(model, OptimizerConfig(lr=1e-3, warmup_steps=0))
    storages = []
    for _ in range(3):
        if offloaded:
            each.offload()
            block = each._state._memory._block
            inside = range(block.data_ptr(), block.data_ptr() + block.numel())
            storages.append([t.data_ptr() in inside for t in state_tensors(each.optimizer)])
            each.restore()
            assert not any(t.data_ptr() in inside for t in state_tensors(each.optimizer))
        each.zero_grad()
        for buffer in (b for chunk in model.chunks for b in chunk.buffers):
            buffer.grad_data.copy_(torch.linspace(-1, 1, buffer.grad_data.numel()))
        each.update(1)
    model.finish_param_sync()
    return {
        "weights": [p.detach().clone() for p in model.modules[0].parameters()],
        "state": [t.detach().clone() for t in state_tensors(each.optimizer)],
        "storages": storages,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizer_rests_in_host_memory_and_comes_back(dtype):
    [here] = gloo.run(updates, 1, dtype, False)
    [away] = gloo.run(updates, 1, dtype, True)
    masters = dtype == torch.bfloat16
    num_weights = len(here["weights"])
    assert [len(where) for where in away["storages"]] == [num_weights * (2 + masters)] * 3
    assert all(all(where) for where in away["storages"])
    assert all(torch.equal(a, b) for a, b in zip(here["weights"], away["weights"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(here["state"], away["state"], strict=True))
    assert here["state"][-1].any()

"""A tiny mixture of experts whose every weight and optimizer state is a formula of its position in the full tensor.

``checkpoint_of_5053ed2.tar.xz`` was written by that commit, whose optimizer was gathered by Megatron, with ``fill``
and its ``checkpoint.save``: four ranks, two tensor-parallel, two expert-parallel, bf16.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.model import build, parallel
from megatron_ext.model.architectures import Architecture, Experts
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.model.trainable import TrainableModel

ARCHITECTURE = Architecture(
    name="Qwen3MoeForCausalLM",
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_groups=2,
    head_dim=8,
    ffn_size=16,
    vocab_size=61,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=64,
    tied=False,
    qkv_bias=False,
    qk_norm=True,
    experts=Experts(num=4, top_k=2, ffn_size=8, renormalise=True, dense_layers=(0,)),
)
LAYOUT: dict[str, Any] = {"tensor": 2, "sequence": True, "expert": 2}
STEPS = 5


def build_trained(world: int, layout: dict[str, Any]) -> TrainableModel:
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    policy = build.build_policy(ARCHITECTURE, ModelLayout(**layout), ModelOptions(torch.bfloat16))
    return TrainableModel.build(policy, OptimizerConfig(lr=0.01))


def known(key: str, kind: str, part: ShardedTensor) -> Tensor:
    """What a part of the full tensor ``key`` holds: multiples of 1/128 below 1, exact in bf16; 0 in padding."""
    total = torch.tensor(zlib.crc32(f"{kind} {key}".encode()) % 1009)
    axes = [torch.arange(n) for n in (*[1] * part.prepend_axis_num, *part.local_shape)]
    grids = torch.meshgrid(*(start + axis for start, axis in zip(part.global_offset, axes, strict=True)), indexing="ij")
    for prime, grid in zip((53, 11, 7, 3), grids, strict=False):
        total = total + prime * grid
    value = (total % 128 / 128).reshape(part.local_shape)
    if "word_embeddings" in key or "output_layer" in key:
        value[grids[0].reshape(part.local_shape) >= ARCHITECTURE.vocab_size] = 0
    return value


def expected(each: TrainableModel) -> Iterator[tuple[Tensor, str, Tensor]]:
    """(parameter, kind, its full local tensor) by what Megatron says of its position; kind "weight" or a state's."""
    for module in each.model.modules:
        sharded_tensors: dict[str, Any] = module.sharded_state_dict(metadata={})
        for name, sharded in sharded_tensors.items():
            if "_extra_state" in name:
                continue
            data: Any = sharded.data
            for kind in ("weight", "param", "exp_avg", "exp_avg_sq"):
                full = torch.empty(data.shape)
                if isinstance(sharded, ShardedTensor):
                    parts: list[Any] = [replace(sharded, data=full, dtype=full.dtype)]
                else:
                    parts = list(nested_values(sharded.build_fn(sharded.key, full, sharded.replica_id, None)))
                for part in parts:
                    part.data.copy_(known(part.key, kind, part))
                yield data, kind, full


def held(each: TrainableModel) -> Iterator[tuple[Tensor, slice, dict[str, Tensor]]]:
    """Parameter, the elements of it that this rank's optimizer owns, and its states of them."""
    optimizer: Any = each.optimizer
    for part in optimizer.chained_optimizers:
        for ranges in part.gbuf_ranges:
            for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
                for parameter, where in bucket["param_map"].items():
                    states = part._get_main_param_and_optimizer_states(parameter)
                    yield parameter, slice(where["param"].start, where["param"].end), states


def fill(each: TrainableModel) -> None:
    """Give an optimizer that has its state, and its model, the known values after ``STEPS`` steps."""
    values = {(parameter, kind): full for parameter, kind, full in expected(each)}
    for (parameter, kind), full in values.items():
        if kind == "weight":
            parameter.data.copy_(full)
    for parameter, own, states in held(each):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            states[kind].data.copy_(values[parameter, kind].view(-1)[own])
        states["step"].fill_(STEPS)

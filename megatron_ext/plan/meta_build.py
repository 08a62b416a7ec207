"""Build one rank's real shard of the models, of any layout and size, without its memory and the other ranks.

A process group that answers for everybody stands in for the cluster, and tensors live on the meta device: Megatron
builds what it would build on that rank. For dry runs (tools/dry_run.py); nothing here can compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ext import cpu_compat
from megatron_ext.config.schema import Config, OptimizerConfig, ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import groups, parallel
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import Policy, build_policy, build_reference
from megatron_ext.model.critic import build_critic
from megatron_ext.model.hf_weights import module_mappings, stream_names
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.optimizer_state import state_tensors, sub_optimizers
from megatron_ext.model.tp_sharding import Replicated
from megatron_ext.model.trainable import TrainableModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """What rank ``rank`` holds.

    ``held`` is in bytes: weights, gradients and optimizer of the policy, reference and critic where there is one.
    ``hf_elements`` counts the HF model's elements that this rank's parameters stand for, together with those of the
    other tensor- and expert-parallel ranks. ``stream`` is what the export would yield, the same on every rank.
    """

    rank: int
    modules: int
    parameters: int
    held: dict[str, int]
    hf_elements: int
    stream: list[tuple[str, Shape]]


def build_shard(config: Config, architecture: Architecture, needs: Needs, rank: int) -> Shard:
    """The shard of global rank ``rank``. Its process must not belong to a process group."""
    cpu_compat.enter()
    layout, options = parallel.model_layout(config.parallel), ModelOptions.from_config(config.model)
    overlap = parallel.overlap(config.parallel)
    with _as_rank(config.parallel, rank):
        reference = critic = None
        with cpu_compat.on_meta():
            policy = build_policy(architecture, layout, options, overlap=overlap, fused_head=config.model.fused_head)
            trained = TrainableModel.build(policy, _some_schedule(config.optimizer))
            if needs.reference:
                reference = build_reference(architecture, layout, options, fused_head=config.model.fused_head)
            if needs.value:
                critic = TrainableModel.build(
                    build_critic(architecture, layout, options, fill=lambda modules: None, overlap=overlap),
                    _some_schedule(config.critic),
                    section="critic",
                )
        held = _trained_bytes(trained)
        if reference is not None:
            held["reference"] = sum(_bytes(p) for module in reference.modules for p in module.parameters())
        if critic is not None:
            held["critic"] = sum(_trained_bytes(critic).values())
        return Shard(
            rank=rank,
            modules=len(policy.modules),
            parameters=sum(p.numel() for module in policy.modules for p in module.parameters()),
            held=held,
            hf_elements=_hf_elements(policy),
            stream=stream_names(policy),
        )


def _hf_elements(policy: Policy) -> int:
    """Elements of the HF tensors behind this rank's parameters: the built sizes times the ranks that share them."""
    total, a = 0, policy.architecture
    for module in policy.modules:
        parameters = dict(module.named_parameters())
        for mapping in module_mappings(module, a):
            parameter = parameters.pop(mapping.megatron)
            if a.tied and mapping.megatron == "output_layer.weight":
                continue  # a second copy of the embedding
            ranks = groups.expert().size() if mapping.expert else 1
            if not isinstance(mapping.sharding, Replicated):
                ranks *= (groups.expert_tensor() if mapping.expert else groups.tensor()).size()
            padding = 0
            if mapping.hf[0] in ("model.embed_tokens.weight", "lm_head.weight"):
                padding = (a.padded_vocab(groups.tensor().size()) - a.vocab_size) * a.hidden_size
            total += parameter.numel() * ranks - padding
        assert not parameters, parameters.keys()
    return total


def _some_schedule(options: OptimizerConfig) -> OptimizerConfig:
    """Whichever: it takes no memory."""
    return options.with_decay_steps(options.warmup_steps + 1)


def _trained_bytes(trained: TrainableModel) -> dict[str, int]:
    """Weights, gradients and the optimizer's state after its first step."""
    buffers = [b for chunk in trained.model.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "weights": sum(_bytes(buffer.param_data) for buffer in buffers),
        "gradients": sum(_bytes(buffer.grad_data) for buffer in buffers),
        "optimizer": _optimizer_bytes(trained.optimizer),
    }


def _optimizer_bytes(optimizer: Any) -> int:
    """fp32 copies of 16-bit weights and Adam's moments, which its first step makes."""
    for part in sub_optimizers(optimizer):
        adam: torch.optim.Optimizer = part.optimizer
        for group in adam.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        adam.step()
    return sum(_bytes(tensor) for tensor in state_tensors(optimizer))


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def _as_rank(layout: ParallelConfig, rank: int) -> Iterator[None]:
    """This process is ``rank`` of the layout's world, and Megatron's groups exist. Nobody else is there."""
    distributed: Any = dist
    real = {name: getattr(dist, name) for name in ("new_group", "all_gather_object")}

    def new_group(*arguments: Any, **options: Any) -> Any:
        return real["new_group"](*arguments, **{**options, "backend": "fake", "pg_options": None})

    def all_gather_object(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)  # every rank says the same

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    distributed.new_group, distributed.all_gather_object = new_group, all_gather_object
    try:
        parallel.initialize(layout)
        yield
    finally:
        for name, function in real.items():
            setattr(distributed, name, function)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

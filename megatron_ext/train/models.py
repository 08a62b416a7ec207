"""The models of a run, with their first weights and their optimizers: policy, reference and critic."""

from __future__ import annotations

import torch

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.weight_initializer import WeightInitializer
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Method
from megatron_ext.model import kernels, parallel
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import build_policy, build_reference
from megatron_ext.model.critic import build_critic
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train.messages import users_files
from megatron_ext.train.method_factory import optimizers
from megatron_ext.train.step import Learner


def build_learner(config: Config, method: Method, architecture: Architecture) -> Learner:
    """The policy, and where the method needs them a reference model and a critic."""
    layout, model_options = parallel.model_layout(config.parallel), ModelOptions.from_config(config.model)
    overlap = parallel.overlap(config.parallel)
    with users_files():
        initializer = WeightInitializer(config.model, architecture)  # before a model of any size is built
    policy = build_policy(
        architecture,
        layout,
        model_options,
        overlap=overlap,
        fused_head=config.model.fused_head,
        routing_replay=config.rollout.routing_replay,
    )
    with users_files():
        initializer.fill(policy.modules)
    reference: Reference | None = None
    if method.needs.reference:
        frozen = build_reference(architecture, layout, model_options, fused_head=config.model.fused_head)
        initializer.fill(frozen.modules)
        reference = Reference(frozen, device=cpu_compat.device(), offload=config.model.offload_reference)
    options = optimizers(config, method)
    actor, critic = TrainableModel.build(policy, options["optimizer"]), None
    if method.needs.value:
        value_model = build_critic(architecture, layout, model_options, fill=initializer.fill, overlap=overlap)
        critic = TrainableModel.build(value_model, options["critic"], section="critic")
    return Learner(config, method, actor, critic, reference)


def describe_kernels(config: Config, architecture: Architecture) -> str:
    """What the layers run on, in one line. Raises ValueError where that would not do."""
    if config.model.deterministic and torch.cuda.is_available():
        raise ValueError(
            "model.deterministic: covers training on a CPU alone, found a GPU; set model.deterministic = false, or "
            'hide the GPUs with CUDA_VISIBLE_DEVICES=""'
        )
    return kernels.describe(
        architecture,
        tensor=config.parallel.tensor,
        context=config.parallel.context,
        dtype=getattr(torch, config.model.dtype),
        longest=config.longest_sequence,
        fusions=ModelOptions.from_config(config.model).fusions,
    )

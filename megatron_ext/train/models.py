"""The models of a run, with their first weights and their optimizers: policy, reference and critic."""

from __future__ import annotations

from typing import Any

import torch

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.weight_initializer import WeightInitializer
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Method
from megatron_ext.model import parallel
from megatron_ext.model.build import build_policy, build_reference
from megatron_ext.model.critic import build_critic
from megatron_ext.model.hf_config import Architecture
from megatron_ext.model.megatron_config import Fusions
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train.messages import users_files
from megatron_ext.train.method_factory import optimizers
from megatron_ext.train.step import Learner


def build_learner(config: Config, method: Method, architecture: Architecture) -> Learner:
    """The policy, and where the method needs them a reference model and a critic."""
    layout: dict[str, Any] = {
        "dtype": getattr(torch, config.model.dtype),
        "recompute": config.model.recompute,
        "fusions": Fusions(**config.model.fusions.model_dump()),
        **parallel.model_layout(config.parallel),
    }
    overlap = parallel.overlap(config.parallel)
    with users_files():
        initializer = WeightInitializer(config.model, architecture)  # before a model of any size is built
    policy = build_policy(architecture, overlap=overlap, fused_head=config.model.fused_head, **layout)
    with users_files():
        initializer.fill(policy.modules)
    reference: Reference | None = None
    if method.needs.reference:
        frozen = build_reference(architecture, fused_head=config.model.fused_head, **layout)
        initializer.fill(frozen.modules)
        reference = Reference(frozen, device=cpu_compat.device(), offload=config.model.offload_reference)
    options = optimizers(config, method)
    actor, critic = TrainableModel.build(policy, options["optimizer"]), None
    if method.needs.value:
        value_model = build_critic(architecture, initializer.fill, overlap=overlap, **layout)
        critic = TrainableModel.build(value_model, options["critic"], section="critic")
    return Learner(config, method, actor, critic, reference)

"""Models for the GPU runs: built as the training loop builds them, with random weights, fed random sequences."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_ext import cpu_compat
from megatron_ext.config.schema import Config, ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import groups, parallel
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import Policy, build_policy
from megatron_ext.model.forward import forward, forward_backward
from megatron_ext.model.hf_weights import module_mappings
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train import packing
from megatron_ext.types import PackedSequences, TokenStats
from tests.gpu.echo import echo_group

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response
MAX_BAD_STEPS = 3


@contextmanager
def one_rank() -> Iterator[None]:
    """Megatron's groups of a world of one: NCCL on a GPU, gloo in a rehearsal."""
    cpu_compat.enter()
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(cpu_compat.backend(), store=HashStore(), rank=0, world_size=1)
    try:
        parallel.initialize(ParallelConfig(ranks_per_node=1))
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def first_rank_of(layout: ParallelConfig) -> Iterator[None]:
    """This process is rank 0 of the layout's world, and Megatron's groups exist, every one an echo."""
    cpu_compat.enter()
    distributed: Any = dist
    real = dist.new_group

    def new_group(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **{**options, "backend": "echo", "pg_options": None})

    with echo_group(layout.world):
        distributed.new_group = new_group
        try:
            parallel.initialize(layout)
            yield
        finally:
            distributed.new_group = real
            parallel_state.destroy_model_parallel()


def policy_of(config: Config, architecture: Architecture) -> Policy:
    """The policy that a run builds."""
    return build_policy(
        architecture,
        parallel.model_layout(config.parallel),
        ModelOptions.from_config(config.model),
        overlap=parallel.overlap(config.parallel),
        fused_head=config.model.fused_head,
    )


@dataclass
class Learning:
    """A policy with its optimizer, and the two passes of a training step on given micro-batches."""

    config: Config
    trained: TrainableModel
    needs: Needs

    @classmethod
    def build(cls, config: Config, architecture: Architecture, needs: Needs, weights: Mapping[str, Tensor] | None):
        """``weights`` are whole HF tensors; None draws random ones on the device."""
        policy = policy_of(config, architecture)
        for module in policy.modules:
            draw(module) if weights is None else fill(module, architecture, weights)
        return cls(config, TrainableModel.build(policy, config.optimizer), needs)

    def score(self, packed: Sequence[PackedSequences]) -> list[TokenStats]:
        found = forward(self.trained.model, packed, self.needs, 1.0)
        assert found is not None
        return found

    def gradients(self, packed: Sequence[PackedSequences]) -> None:
        """Leave the gradient of minus the sum of log-probabilities, and of what else is asked for, in the buffers."""
        self.trained.zero_grad()
        forward_backward(self.trained.model, packed, self.needs, 1.0, lambda _, stats: loss_of(stats))

    def update(self, packed: Sequence[PackedSequences]) -> float:
        """A whole update, its weights gathered; the gradient's norm."""
        self.gradients(packed)
        norm, _ = self.trained.update(MAX_BAD_STEPS)
        self.trained.model.finish_param_sync()
        return norm

    def gradient_of(self, name: str) -> Tensor:
        """The fp32 gradient in the buffers of one parameter of the first module."""
        return dict(self.trained.model.modules[0].named_parameters())[name].main_grad  # pyright: ignore


def loss_of(stats: TokenStats) -> Tensor:
    """Every differentiable statistic that is there, so that its backward runs too."""
    loss = -stats.logprob.sum()
    if stats.nucleus_entropy is not None and stats.nucleus_entropy.requires_grad:
        loss = loss - 0.1 * stats.nucleus_entropy.sum()
    return loss


def draw(module: GPTModel) -> None:
    """Random weights on the device; the output layer's give logits as steep as a language model's.

    Normal logits with a deviation of 4.5 have .8 of their mass on some 20 of 152k tokens.
    """
    torch.manual_seed(0)
    heads = (
        "output_layer.weight",
        *(["embedding.word_embeddings.weight"] if module.share_embeddings_and_output_weights else []),
    )
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=4.5 / parameter.shape[1] ** 0.5 if name in heads else 0.02)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def fill(module: GPTModel, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
    """This rank's cuts of whole HF tensors in memory."""
    parameters = dict(module.named_parameters())
    for mapping in module_mappings(module, architecture):
        group = groups.expert_tensor() if mapping.expert else groups.tensor()
        shard = mapping.sharding.shard([weights[name] for name in mapping.hf], group.rank(), group.size())
        parameters.pop(mapping.megatron).data.copy_(shard)
    assert not parameters, parameters.keys()


def sequences(vocab: int, lengths: Sequence[tuple[int, int]]) -> list[Pair]:
    """Random tokens, the given numbers of them in prompt and response."""
    draw = random.Random(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(count))

    return [(tokens(prompt), tokens(response)) for prompt, response in lengths]


def pack(pairs: Sequence[Pair], parallel_: ParallelConfig) -> PackedSequences:
    return packing.pack(pairs, multiple=parallel_.tensor if parallel_.sequence else 1)

"""Megatron's process groups by name, typed."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state


def tensor() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def pipeline() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def data() -> dist.ProcessGroup:
    """The ranks that train on other sequences with the same shard of the model."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())


def context() -> dist.ProcessGroup:
    """The ranks that share the tokens of the same sequences out."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def data_context() -> dist.ProcessGroup:
    """Data and context parallelism together: the ranks that hold the same shard of everything but experts."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))


def expert() -> dist.ProcessGroup:
    """The ranks that share the experts of a layer out."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_model_parallel_group())


def expert_tensor() -> dist.ProcessGroup:
    """The ranks over which each expert is sharded."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_tensor_parallel_group())


def expert_model() -> dist.ProcessGroup:
    """Expert and expert-tensor parallelism together: the ranks that hold one copy of a layer's experts."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_tensor_and_model_parallel_group())


def expert_data() -> dist.ProcessGroup:
    """The ranks that hold the same shard of the same experts."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_data_parallel_group())


def model() -> dist.ProcessGroup:
    """Tensor and pipeline parallelism together: the ranks that hold one copy of the model.

    Under context parallelism several copies train on the same sequences (parallel.same_sequences).
    """
    return cast(dist.ProcessGroup, parallel_state.get_model_parallel_group())


def is_last_stage() -> bool:
    return pipeline().rank() == pipeline().size() - 1

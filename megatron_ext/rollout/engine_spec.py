"""What a rollout engine declares: all that configuration checks, the planner and the tools know of it. No torch.

A declaration stands in the engine's folder (``spec.py``) or in the user's package, and is imported to check a recipe;
``create`` imports the engine itself, with torch and its package, where a run needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config.schema import Config, RolloutConfig

if TYPE_CHECKING:
    from megatron_ext.rollout.base import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class EngineStart:
    """What an engine is created from, the same on every rank. ``log_dir`` takes the output of servers it starts.

    ``keeps_support``: every request has a top-k, and its sample is to bear the tokens that the sampler kept.
    """

    model_path: str | Path
    rollout: RolloutConfig
    dtype: str
    max_prompt_tokens: int
    log_dir: Path
    keeps_support: bool = False

    @property
    def max_tokens(self) -> int:
        """Of prompt and response together."""
        return self.max_prompt_tokens + self.rollout.max_response_tokens


@dataclass(frozen=True)
class NoOptions:
    """Of an engine that has none below ``[rollout.options]``."""


def nothing_missing() -> str | None:
    """Of an engine that needs no package of its own."""
    return None


def no_faults(config: Config) -> list[str]:
    """Of an engine without rules of its own between fields."""
    return []


def one_per_group(config: Config) -> int:
    """Engines of a run in which ``rollout.tensor_parallel_size`` ranks share one."""
    return config.parallel.world // config.rollout.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One rollout engine."""

    create: Callable[[EngineStart, Any], RolloutEngine]  # on every rank, with its options
    options: type = NoOptions  # a dataclass: the fields of [rollout.options]
    keys: tuple[str, ...] = ()  # of [rollout]: those that not all engines heed
    missing_package: Callable[[], str | None] = nothing_missing  # what is not installed or too old, and what to do
    faults: Callable[[Config], list[str]] = no_faults  # rules of its own between fields
    colocated: bool = True  # on the trainer's GPUs; else on its own, which the plan leaves out
    beside_training: bool = False  # needs nothing of the trainer's while it generates: no device, group or weights
    stops_early: bool = False  # heeds what is no longer needed (generate's is_needed)
    sleeps: bool = False  # gives its memory to the trainer between rollouts, by mapping it itself
    takes_share: bool = False  # fills rollout.gpu_memory_utilization with KV cache; else it holds one batch's
    continuous_batching: bool = False  # a finished sequence is replaced at once; else a batch ends with its longest
    prefill_tokens: int | None = None  # of one prompt pass; None: all prompts of a batch at once
    cuda_graphs: bool = False  # kept while it sleeps, unless rollout.enforce_eager
    communicators: tuple[str, ...] = ()  # groups of rollout.tensor_parallel_size ranks with NCCL buffers of their own
    expert_communicators: tuple[str, ...] = ()  # more of them, for a model with experts
    num_engines: Callable[[Config], int] = one_per_group  # copies of the model that sample

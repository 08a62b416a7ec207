"""What colocated vLLM declares: it takes a share of the trainer's GPUs and gives it back between rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_ext.config.schema import Config
from megatron_ext.rollout.engine_spec import EngineSpec, EngineStart, NoOptions
from megatron_ext.rollout.vllm.version import vllm_fault

if TYPE_CHECKING:
    from megatron_ext.rollout.base import RolloutEngine

KEYS = ("tensor_parallel_size", "gpu_memory_utilization", "enforce_eager", "model_runner")
NEEDS_V2 = "vLLM tells the experts of its tokens (rollout.routing_replay) with its model runner V2 only"
PREFILL_TOKENS = 8192  # of a prompt pass on a GPU, max_num_batched_tokens: vLLM's own default goes by the GPU's name


def arguments(start: EngineStart) -> dict[str, Any]:
    """What both engines of vLLM are made with."""
    return {
        "dtype": start.dtype,
        "max_tokens": start.max_tokens,
        "batch_size": start.rollout.batch_size,
        "keeps_support": start.keeps_support,
        **{key: getattr(start.rollout, key) for key in KEYS},
    }


def create(start: EngineStart, options: NoOptions) -> RolloutEngine:
    del options
    from megatron_ext.rollout.vllm.engine import VLLMEngine

    return VLLMEngine(start.model_path, **arguments(start), routing_replay=start.rollout.routing_replay)


def faults(config: Config) -> list[str]:
    shared, ranks = config.rollout.tensor_parallel_size, config.parallel.ranks_per_node
    found = []
    if ranks % shared:
        found.append(
            f"rollout.tensor_parallel_size: {shared} ranks cannot share an engine: parallel.ranks_per_node is {ranks}; "
            f"{config.rollout.engine} takes a divisor of the ranks of a node"
        )
    if config.rollout.routing_replay and config.rollout.model_runner == "v1":
        found.append(f'rollout.model_runner: v1, but {NEEDS_V2}; set rollout.model_runner = "auto"')
    if config.rollout.routing_replay and shared > 1:
        found.append(
            f"rollout.tensor_parallel_size: {shared}, but in an engine of several ranks of the trainer vLLM tells the "
            "experts of its tokens (rollout.routing_replay) to the first alone, and stops in the others; set "
            "rollout.tensor_parallel_size = 1"
        )
    return found


SPEC = EngineSpec(
    create=create,
    keys=(*KEYS, "routing_replay"),
    missing_package=vllm_fault,
    faults=faults,
    sleeps=True,
    takes_share=True,
    continuous_batching=True,
    prefill_tokens=PREFILL_TOKENS,
    cuda_graphs=True,
    communicators=("engine", "engine, PyNccl"),
    expert_communicators=("engine's experts, PyNccl",),
)

"""What vLLM behind HTTP declares: GPUs of its own, which the trainer's plan leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ext.config.schema import Config
from megatron_ext.rollout.engine_spec import EngineSpec, EngineStart, NoOptions
from megatron_ext.rollout.vllm.spec import KEYS, PREFILL_TOKENS, arguments
from megatron_ext.rollout.vllm.version import vllm_fault

if TYPE_CHECKING:
    from megatron_ext.rollout.base import RolloutEngine


def create(start: EngineStart, options: NoOptions) -> RolloutEngine:
    del options
    from megatron_ext.rollout.vllm_server.engine import ServerEngine

    servers = start.rollout.servers.model_dump()
    return ServerEngine(start.model_path, **arguments(start), **servers, log_dir=start.log_dir)


def num_engines(config: Config) -> int:
    servers = config.rollout.servers
    return len(servers.urls) or servers.num


def faults(config: Config) -> list[str]:
    servers = config.rollout.servers
    if len(servers.devices) in (0, servers.num):
        return []
    return [
        f"rollout.servers.devices: {len(servers.devices)} entries for rollout.servers.num = {servers.num} servers; "
        "give one string of device numbers for each"
    ]


SPEC = EngineSpec(
    create=create,
    keys=(*KEYS, "servers"),
    missing_package=vllm_fault,
    faults=faults,
    colocated=False,
    beside_training=True,
    stops_early=True,
    takes_share=True,
    continuous_batching=True,
    prefill_tokens=PREFILL_TOKENS,
    num_engines=num_engines,
)

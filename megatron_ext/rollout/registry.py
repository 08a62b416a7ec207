"""The configuration's rollout engine: transformers, or vLLM in this process or behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.rollout.base import RolloutEngine
from megatron_ext.rollout.vllm.version import vllm_fault


def check_engine(rollout: RolloutConfig) -> None:
    """Raise ConfigError where the engine's package is missing or is of a version that cannot be driven."""
    if rollout.engine != "hf" and (fault := vllm_fault()):
        raise ConfigError(f"rollout.engine: {rollout.engine}: {fault}")


def create_engine(
    model_path: str | Path, rollout: RolloutConfig, *, dtype: str, max_prompt_tokens: int, log_dir: Path
) -> RolloutEngine:
    """Build it, on every rank. Raises ConfigError for a model directory that no engine can serve.

    ``log_dir`` takes the output of servers that are started.
    """
    check_engine(rollout)
    vllm: dict[str, Any] = {
        "dtype": dtype,
        "max_tokens": max_prompt_tokens + rollout.max_response_tokens,
        "batch_size": rollout.batch_size,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "enforce_eager": rollout.enforce_eager,
        "model_runner": rollout.model_runner,
    }
    try:
        if rollout.engine == "hf":
            from megatron_ext.rollout.hf.engine import HFEngine

            return HFEngine(model_path, batch_size=rollout.batch_size)
        if rollout.engine == "vllm":
            from megatron_ext.rollout.vllm.engine import VLLMEngine

            return VLLMEngine(model_path, **vllm)
        from megatron_ext.rollout.vllm_server.engine import ServerEngine

        return ServerEngine(model_path, **vllm, **rollout.servers.model_dump(), log_dir=log_dir)
    except (OSError, ValueError) as error:
        known = str(error).startswith("rollout.")  # an option at fault, and not the model
        where = "" if known else f"model.path: {model_path} cannot be loaded by rollout.engine={rollout.engine}: "
        raise ConfigError(f"{where}{error}") from None

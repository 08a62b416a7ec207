"""The rollout engines by name, and how ``[rollout]`` becomes one. No torch until an engine is created.

A new engine is one folder beside these, with a ``spec.py``, and one line in ENGINES; or a declaration in the user's own
package, which ``rollout.engine`` names as ``package.module:NAME``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.plugins import check_options, is_spec, load, options_of_class, suggest
from megatron_ext.rollout.engine_spec import EngineSpec, EngineStart
from megatron_ext.rollout.hf.spec import SPEC as HF
from megatron_ext.rollout.vllm.spec import SPEC as VLLM
from megatron_ext.rollout.vllm_server.spec import SPEC as VLLM_SERVER

if TYPE_CHECKING:
    from megatron_ext.rollout.base import RolloutEngine

ENGINES: dict[str, EngineSpec] = {"hf": HF, "vllm": VLLM, "vllm_server": VLLM_SERVER}


def find_engine(rollout: RolloutConfig) -> EngineSpec:
    """The declaration of ``rollout.engine``, its ``[rollout.options]`` checked. Raises ConfigError."""
    name = rollout.engine
    if name not in ENGINES and not is_spec(name):
        raise ConfigError(f"rollout.engine: unknown engine {name!r}; {suggest(name, ENGINES)}")
    try:
        spec = ENGINES[name] if name in ENGINES else load(name, key="rollout.engine")
        if not isinstance(spec, EngineSpec):
            raise ValueError(
                f"rollout.engine: {name} is {spec!r}, expected a megatron_ext.rollout.engine_spec.EngineSpec, which "
                "says how the engine is created"
            )
        check_options(rollout.options, options_of_class(spec.options), section="rollout.options", owner=name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return spec


def check_engine(rollout: RolloutConfig) -> EngineSpec:
    """``find_engine``; raises ConfigError also where the engine's package is missing or cannot be driven."""
    spec = find_engine(rollout)
    if fault := spec.missing_package():
        raise ConfigError(f"rollout.engine: {rollout.engine}: {fault}")
    return spec


def create_engine(
    model_path: str | Path,
    rollout: RolloutConfig,
    *,
    dtype: str,
    max_prompt_tokens: int,
    log_dir: Path,
    keeps_support: bool = False,
) -> RolloutEngine:
    """Build it, on every rank. Raises ConfigError for a model directory that no engine can serve.

    ``log_dir`` takes the output of servers that are started. ``keeps_support``: see EngineStart.
    """
    spec = check_engine(rollout)
    start = EngineStart(
        model_path=model_path,
        rollout=rollout,
        dtype=dtype,
        max_prompt_tokens=max_prompt_tokens,
        log_dir=log_dir,
        keeps_support=keeps_support,
    )
    try:
        return spec.create(start, spec.options(**rollout.options))
    except (OSError, ValueError) as error:
        known = str(error).startswith("rollout.")  # an option at fault, and not the model
        where = "" if known else f"model.path: {model_path} cannot be loaded by rollout.engine={rollout.engine}: "
        raise ConfigError(f"{where}{error}") from None

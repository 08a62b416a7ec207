"""What the embedded engine declares: the whole model on every rank, always there, a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_ext.rollout.engine_spec import EngineSpec, EngineStart

if TYPE_CHECKING:
    from megatron_ext.rollout.base import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class HFOptions:
    """``[rollout.options]``."""

    dtype: Literal["", "bfloat16", "float32"] = ""  # of the engine; "": model.dtype


def create(start: EngineStart, options: HFOptions) -> RolloutEngine:
    from megatron_ext.rollout.hf.engine import HFEngine

    return HFEngine(start.model_path, batch_size=start.rollout.batch_size, dtype=options.dtype or start.dtype)


SPEC = EngineSpec(create=create, options=HFOptions, keys=("routing_replay",), stops_early=True)

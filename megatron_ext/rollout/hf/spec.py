"""What the embedded engine declares: the whole model on every rank, always there, a batch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ext.rollout.engine_spec import EngineSpec, EngineStart, NoOptions

if TYPE_CHECKING:
    from megatron_ext.rollout.base import RolloutEngine


def create(start: EngineStart, options: NoOptions) -> RolloutEngine:
    del options
    from megatron_ext.rollout.hf.engine import HFEngine

    return HFEngine(start.model_path, batch_size=start.rollout.batch_size)


SPEC = EngineSpec(create=create, keys=("routing_replay",), stops_early=True)

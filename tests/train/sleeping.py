"""An engine that sleeps: transformers', whose every answer takes some seconds more, spent asleep.

So does a rollout on GPUs of its own look to a trainer: it takes time, and none of the trainer's cores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.rollout.base import IsNeeded, OnBatch, Request, Sampling
from megatron_ext.rollout.engine_spec import EngineSpec, EngineStart
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.types import Sample


@dataclass(frozen=True)
class Options:
    seconds: float = 0.0


class SleepingEngine(HFEngine):
    def __init__(self, model_path: str | Path, *, batch_size: int, seconds: float) -> None:
        super().__init__(model_path, batch_size=batch_size)
        self.seconds = seconds

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_batch: OnBatch | None = None,
        is_needed: IsNeeded | None = None,
    ) -> list[Sample]:
        time.sleep(self.seconds)
        return super().generate(requests, sampling, on_batch, is_needed)


def create(start: EngineStart, options: Any) -> SleepingEngine:
    return SleepingEngine(start.model_path, batch_size=start.rollout.batch_size, seconds=options.seconds)


BESIDE = EngineSpec(create=create, options=Options, beside_training=True, stops_early=True)
IN_TURN = replace(BESIDE, beside_training=False)

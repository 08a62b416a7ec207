"""A controller that moves with every micro-batch's loss, and so on the last pipeline stage only, has one state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import cpu_compat
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import parallel
from tests import gloo
from tests.train import whole_run


def trained(folder: Path, world: int, *layout: str) -> tuple[dict[str, float], dict[str, Any]]:
    """The method's state in the checkpoint of two steps of several micro-batches, and the last metrics."""
    options = ("method.scope=micro_batch", "train.micro_batch_tokens=100", "method.k_i=0.1", *layout)
    assert whole_run.train(folder, "entropic/entropic-tiny-cpu.toml", *options, world=world) == 0
    path = folder / "run" / "checkpoints" / "step_000002" / "state.pt"
    return torch.load(path, weights_only=True)["state"]["method"], whole_run.metrics(folder)[-1]


def test_a_pipeline_has_the_state_of_one_stage(tmp_path: Path) -> None:
    state, metrics = trained(tmp_path / "one", 1)
    assert state["integral"] != 0 and 0 < abs(state["alpha"]) <= 1
    other_state, other_metrics = trained(tmp_path / "two", 2, "parallel.pipeline=2")
    assert other_state == pytest.approx(state, rel=1e-4)
    for name in ("entropic/alpha", "entropic/integral", "loss/policy", "grad/norm"):
        assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-7)


def agreed(rank: int, world: int) -> tuple[int, int]:
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, pipeline=2))
    return parallel.from_first_copy(rank), parallel.groups.data().rank()


def test_every_rank_gets_what_the_first_copys_last_stage_holds() -> None:
    """Two stages x two copies: ranks 0 and 1 are the first stage, 2 and 3 the last."""
    assert gloo.run(agreed, 4) == [(2, 0), (2, 1), (2, 0), (2, 1)]

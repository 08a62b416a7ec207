"""The engine samples from the weights that the trainer has after its last update, whatever ends a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import whole_run

ROUNDING = 1e-5  # nats between transformers' forward and Megatron's on the CPU


@pytest.mark.parametrize("recipe", ["grpo/grpo-tiny-cpu.toml", "siren/siren-tiny-cpu.toml", "ppo/ppo-tiny-cpu.toml"])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_engine_samples_from_the_last_update(recipe: str, updates: int, tmp_path: Path) -> None:
    """Two data-parallel ranks update a half each: what the other one updated is gathered before it is read."""
    options = ("parallel.ranks_per_node=2", f"train.mini_batch_prompts={4 // updates}", "optimizer.lr=1e-2")
    assert whole_run.train(tmp_path, recipe, *options, "train.steps=3", world=2) == 0
    assert [step["mismatch/mean"] < ROUNDING for step in whole_run.metrics(tmp_path)] == [True] * 3

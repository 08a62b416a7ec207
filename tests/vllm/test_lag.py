"""A run on servers of the real vLLM, on a CPU, that generate beside training: exact lag, hidden time, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import gloo
from tests.train import whole_run
from tests.vllm.test_servers import free_ports_from

RECIPE = "siren/siren-tiny-cpu.toml"
OPTIONS = (
    *("rollout.engine=vllm_server", "rollout.enforce_eager=true", "rollout.servers.num=2", "rollout.max_lag=1"),
    *("train.steps=5", "optimizer.lr=2e-3", "checkpoint.keep=9", "reward.workers=1"),
)
START_S = 600.0  # of two servers on a busy machine, and five steps


def options() -> tuple[str, ...]:
    return (*OPTIONS, f"rollout.servers.port={free_ports_from()}")


def train(folder: Path, die_after: int | None = None) -> None:
    whole_run.data()
    arguments: Any = (folder, RECIPE, options(), die_after)
    assert gloo.run(whole_run._rank, 2, *arguments, timeout=START_S) == [0, 0]


def test_servers_generate_beside_training_with_the_weights_of_the_step_before(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    steps = whole_run.steps(tmp_path / "whole")
    assert [step["rollout/lag"] for step in steps] == [0, 1, 1, 1, 1]
    assert all(step["servers/stale"] == step["servers/failed"] == step["servers/restarts"] == 0 for step in steps)
    assert steps[0]["mismatch/mean"] < 1e-4 < min(step["mismatch/mean"] for step in steps[1:])
    assert all(step["time/rollout_background_s"] > 0 for step in steps[:-1])
    with pytest.raises(AssertionError, match="died without a report"):
        train(tmp_path / "killed", die_after=2)
    train(tmp_path / "killed")
    found = whole_run.steps(tmp_path / "killed")
    for key in ("response/length", "response/truncated", "reward/mean", "rollout/lag"):  # what a seed fixes
        assert [step[key] for step in found[:3]] == [step[key] for step in steps[:3]]
    state = tmp_path / "killed" / "run" / "checkpoints" / "step_000002" / "state.pt"
    assert json.loads(ahead(state)[0]["fields"])["version"] == 1


def ahead(path: Path) -> list[dict[str, Any]]:
    import torch

    return torch.load(path, weights_only=True)["state"]["ahead"]

"""Under ``data.stage_restart`` a curriculum's stages begin like runs of their own, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext.data.curriculum import FORMAT, fingerprint, stage_of
from megatron_ext.model.optimizer_state import sub_optimizers
from megatron_ext.train.trainer import Trainer
from megatron_ext.types import Problem
from tests.train import whole_run

RECIPE = "sent/sent-tiny-cpu.toml"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Four steps of two updates, the second stage from the third step on."""
    rows = [json.loads(line) for line in whole_run.data().read_text().splitlines()]
    problems = [Problem(row["id"], row["prompt"], row["answer"]) for row in rows]
    header = {"format": FORMAT, "problems_sha256": fingerprint(problems), "num_problems": len(rows), "stages": 2}
    order = [
        {"row": rank, "id": row["id"], "stage": stage_of(rank, len(rows), 2), "entropy": rank / 100, "clusters": []}
        for rank, row in enumerate(rows)
    ]
    path = tmp_path_factory.mktemp("curriculum") / "curriculum.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (header, *order)))
    return (
        *(f'data.curriculum="{path}"', "data.stage_starts=[2]", "train.steps=4", "checkpoint.keep=4"),
        *("optimizer.lr=1e-3", "method.cov_ratio=0.05"),
    )


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch's own reader."""
    reader = FileSystemReader(folder / "run" / "checkpoints" / f"step_{step:06d}")
    index = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in index.items()
        if isinstance(each, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def steps_taken(folder: Path, step: int) -> int:
    path = folder / "run" / "checkpoints" / f"step_{step:06d}" / "common.pt"
    groups = torch.load(path, weights_only=True)["policy"]["optimizer"]["optimizer"]["param_groups"]
    return groups[0]["step"]


def run_and_look(folder: Path, *options: str) -> list[dict[str, Any]]:
    """A run, and what each of its steps finds when it begins: the largest moment, and the reference's distance."""
    real = Trainer.begin_stage

    def begin_stage(self: Trainer) -> None:
        real(self)
        reference = self.learner.reference
        assert reference is not None
        pairs = zip(
            *(module.parameters() for module in (reference.policy.modules[0], self.learner.policy.modules[0])),
            strict=True,
        )
        states = [
            state for part in sub_optimizers(self.learner.actor.optimizer) for state in part.optimizer.state.values()
        ]
        seen = {
            "moment": max((float(s[n].abs().max()) for s in states for n in ("exp_avg", "exp_avg_sq")), default=0.0),
            "distance": max(float((frozen - live).abs().max()) for frozen, live in pairs),
        }
        with (folder / "seen").open("a") as file:
            file.write(json.dumps(seen) + "\n")

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "begin_stage", begin_stage)  # the forked rank takes it along
        assert whole_run.train(folder, RECIPE, *options) == 0
    return [json.loads(line) for line in (folder / "seen").read_text().splitlines()]


@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_stage_begins_with_zero_moments_and_the_policy_as_its_reference(
    offload: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    away = (f"model.offload_optimizer={offload}", f"model.offload_reference={offload}", "data.stage_restart=true")
    first, second, third, fourth = run_and_look(tmp_path / "on", *options, *away)
    assert first["distance"] == 0 and second["distance"] > 0 and second["moment"] > 0
    assert third == {"moment": 0.0, "distance": 0.0}
    assert fourth["distance"] > 0 and fourth["moment"] > 0
    before, after = tensors(tmp_path / "on", 2), tensors(tmp_path / "on", 3)
    weights = [name for name in before if not name.startswith(("optimizer.", "reference."))]
    assert {name for name in after if name.startswith("reference.")} == {f"reference.{name}" for name in weights}
    for name in weights:
        assert torch.equal(after[f"reference.{name}"], before[name]), name
    assert any(not torch.equal(after[name], before[name]) for name in weights)
    assert [steps_taken(tmp_path / "on", step) for step in (1, 2, 3, 4)] == [2, 4, 2, 4]


def test_without_it_the_run_goes_on(options: tuple[str, ...], tmp_path: Path) -> None:
    _, _, third, _ = run_and_look(tmp_path / "off", *options)
    assert third["distance"] > 0 and third["moment"] > 0
    assert not any(name.startswith("reference.") for name in tensors(tmp_path / "off", 3))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_around_the_boundary_goes_on_bit_for_bit(
    world: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    own = (*options, "data.stage_restart=true")
    assert whole_run.train(tmp_path / "whole", RECIPE, *own, world=world) == 0
    for after in (2, 3):  # the boundary is still to come, and is behind
        folder = tmp_path / f"killed{after}"
        whole_run.train_and_die(folder, RECIPE, *own, after=after, world=world)
        assert whole_run.train(folder, RECIPE, *own, world=world) == 0
        assert whole_run.metrics(folder) == whole_run.metrics(tmp_path / "whole")
        assert whole_run.contents(folder, 4) == whole_run.contents(tmp_path / "whole", 4)


def test_stages_that_restart_need_a_curriculum(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="data.stage_restart: there are no stages without data.curriculum"):
        whole_run.train(tmp_path, RECIPE, "data.stage_restart=true")

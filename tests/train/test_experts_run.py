"""A mixture of experts trains: rollouts, updates and checkpoints of whole runs, under expert and pipeline layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.train import whole_run
from tools import convert

BASE = whole_run.RECIPES / "tiny" / "base"
RECIPE = "siren/siren-tiny-cpu.toml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's tokenizer with a random model of 4 experts."""
    return tiny.experts_model(tmp_path_factory.mktemp("model") / "moe", layers=4, experts=4)


def common(model: Path) -> tuple[str, ...]:
    return (f'model.path="{model}"', 'model.dtype="float32"')


def exported(folder: Path) -> dict[str, torch.Tensor]:
    assert convert.main(["to-hf", str(folder / "run"), str(folder / "hf")]) == 0
    return AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run on one rank reports, and its export."""
    folder = tmp_path_factory.mktemp("alone")
    assert whole_run.train(folder, RECIPE, *common(model)) == 0
    return whole_run.metrics(folder), exported(folder)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, ("parallel.expert=2",)),
        (2, ("parallel.pipeline=2", "parallel.virtual=2")),
        (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")),
    ],
    ids=["EP 2", "VPP 2", "EP 2 x TP 2"],
)
def test_a_run_is_the_same_under_every_layout(world: int, layout: tuple, model: Path, alone, tmp_path: Path) -> None:
    """Losses and entropies of two steps with two updates each, and what is exported, agree with one rank's."""
    steps, weights = alone
    options = (f"parallel.ranks_per_node={world}", *layout)
    assert whole_run.train(tmp_path, RECIPE, *common(model), *options, world=world) == 0
    for one, many in zip(steps, whole_run.metrics(tmp_path), strict=True):
        for name in ("loss/policy", "entropy/full", "reward/mean", "grad/norm"):
            assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
        assert many["mismatch/max"] < 1e-3  # the engine samples from the weights that were streamed to it
    found = exported(tmp_path)
    moved = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
    assert sum(not torch.equal(value, moved[name]) for name, value in weights.items()) > len(moved) / 2

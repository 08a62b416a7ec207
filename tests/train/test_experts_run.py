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


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, ("parallel.expert=2",)),
        (2, ("parallel.pipeline=2", "parallel.virtual=2")),
        (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")),
    ],
    ids=["EP 2", "VPP 2", "EP 2 x TP 2"],
)
def test_a_run_is_the_same_under_every_layout(world: int, layout: tuple, model: Path, tmp_path: Path) -> None:
    """Losses and entropies of two steps with two updates each, and what is exported, agree with one rank's."""
    common = (f'model.path="{model}"', 'model.dtype="float32"')
    assert whole_run.train(tmp_path / "one", RECIPE, *common) == 0
    assert (
        whole_run.train(tmp_path / "many", RECIPE, *common, f"parallel.ranks_per_node={world}", *layout, world=world)
        == 0
    )
    for one, many in zip(whole_run.metrics(tmp_path / "one"), whole_run.metrics(tmp_path / "many"), strict=True):
        for name in ("loss/policy", "entropy/full", "reward/mean", "grad/norm"):
            assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
        assert many["mismatch/max"] < 1e-3  # the engine samples from the weights that were streamed to it
    exported = []
    for name in ("one", "many"):
        assert convert.main(["to-hf", str(tmp_path / name / "run"), str(tmp_path / name / "hf")]) == 0
        exported.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "hf").state_dict())
    moved = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, value in exported[0].items():
        torch.testing.assert_close(exported[1][name], value, rtol=0, atol=1e-4)
    assert sum(not torch.equal(value, moved[name]) for name, value in exported[0].items()) > len(moved) / 2

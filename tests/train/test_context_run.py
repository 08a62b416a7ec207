"""A whole run whose sequences are cut over ranks, and one that goes on under another size and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import whole_run

RECIPE = "siren/siren-tiny-cpu.toml"


def test_a_run_goes_on_with_other_cuts(tmp_path: Path) -> None:
    """The second step's responses come from the same weights, so it is the same step but for rounding."""
    for steps, size in ((1, 1), (2, 2), (3, 1)):
        cut = (f"parallel.context={size}", f"train.steps={steps}")
        assert whole_run.train(tmp_path / "changed", RECIPE, *cut, world=size) == 0
    assert whole_run.train(tmp_path / "whole", RECIPE, "train.steps=2") == 0
    first, second, third = whole_run.metrics(tmp_path / "changed")
    expected = whole_run.metrics(tmp_path / "whole")
    assert first == expected[0]
    assert second.keys() == expected[1].keys() and second["grad/norm"] > 0
    assert second == pytest.approx(expected[1], rel=1e-3, abs=1e-5)
    assert third["grad/norm"] > 0 and third["grad/skipped"] == 0


def test_a_cut_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = ("parallel.context=2", "train.steps=3")
    assert whole_run.train(tmp_path / "whole", RECIPE, *options, world=2) == 0
    whole_run.train_and_die(tmp_path / "killed", RECIPE, *options, after=2, world=2)
    assert whole_run.train(tmp_path / "killed", RECIPE, *options, world=2) == 0
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 3) == whole_run.contents(tmp_path / "whole", 3)

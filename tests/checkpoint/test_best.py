"""The best checkpoint is never deleted, ``best`` never names what is not there, and tools find it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_ext.checkpoint.best import best_of, mark
from megatron_ext.checkpoint.manifest import CheckpointError
from tests.checkpoint.test_manifest import remove_old, save, steps
from tools import convert


def save_best(root: Path, step: int, best: int | None, keep: int = 1) -> None:
    """As Checkpoints.publish does it: committed, marked, old ones removed."""
    save(root, step, keep=100)
    mark(root, best)
    remove_old(root, step, keep, best=best)


def test_the_best_stays_until_a_better_one_comes(tmp_path: Path) -> None:
    save_best(tmp_path, 5, 5)
    assert steps(tmp_path) == ["best", "latest", "step_000005"]
    for step in (10, 15):
        save_best(tmp_path, step, 5)
        assert steps(tmp_path) == ["best", "latest", "step_000005", f"step_{step:06d}"]
    save_best(tmp_path, 20, 20)
    assert steps(tmp_path) == ["best", "latest", "step_000020"] and best_of(tmp_path).name == "step_000020"
    save_best(tmp_path, 25, None)
    assert steps(tmp_path) == ["latest", "step_000025"]


def test_among_the_newest_it_counts_as_one_of_them(tmp_path: Path) -> None:
    for step, best in ((5, None), (10, 10), (15, 10), (20, 10), (20, 10)):
        save_best(tmp_path, step, best, keep=2)
    assert steps(tmp_path) == ["best", "latest", "step_000010", "step_000015", "step_000020"]


def test_a_kill_while_it_is_marked_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    mark(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mark(tmp_path, 10)
    assert best_of(tmp_path).name == "step_000005"
    save(tmp_path, 15, keep=3)  # removes what the kill left
    assert steps(tmp_path) == ["best", "latest", "step_000005", "step_000010", "step_000015"]


def test_best_names_nothing_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 5)
    mark(tmp_path, 5)
    mark(tmp_path, 4)
    with pytest.raises(CheckpointError, match="no best checkpoint: the run was not validated yet"):
        best_of(tmp_path)
    for text in ("step_000004", "../elsewhere", ""):
        (tmp_path / "best").write_text(text)
        with pytest.raises(CheckpointError, match="which is no checkpoint there"):
            best_of(tmp_path)


def test_conversion_finds_it_by_its_path(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path / "checkpoints", step)
    mark(tmp_path / "checkpoints", 5)
    assert convert.find(tmp_path / "checkpoints" / "best")[1].step == 5
    assert convert.find(tmp_path)[1].step == 10


def test_the_command_line_says_that_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoints", 5)
    assert convert.main(["to-hf", str(tmp_path), str(tmp_path / "out"), "--best"]) == 2
    assert "holds no best checkpoint" in capsys.readouterr().err

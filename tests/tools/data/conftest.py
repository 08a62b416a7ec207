"""Real data files in every form, and one pool of verifier processes for all tests of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.rollout.rewards.reward_pool import RewardPool
from tools.data import command

Rows = list[dict[str, Any]]
Run = Callable[..., int]


class SharedPool:
    """A pool that outlives the command that uses it."""

    def __init__(self, pool: RewardPool) -> None:
        self.score = pool.score

    def __enter__(self) -> SharedPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(1) as pool:
        yield pool


@pytest.fixture
def run(pool: RewardPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``megatron-entropy data`` in an empty folder; its exit code."""
    monkeypatch.setattr("megatron_ext.rollout.rewards.reward_pool.RewardPool", lambda workers: SharedPool(pool))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> int:
        try:
            return command.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # of the parser
            return int(stop.code or 0)

    return call


def write(path: Path, rows: list[Any]) -> Path:
    """``rows`` as the kind of file that ``path`` ends in; without an ending as ``save_to_disk`` writes them."""
    import datasets

    datasets.disable_progress_bars()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".arrow":
        folder = path.with_suffix(".saved")
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        next(folder.glob("*.arrow")).rename(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.stem}.manifest.json").read_text())

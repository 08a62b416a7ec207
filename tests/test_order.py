"""The order of the tests: each worker's share begins with long files, and none is lost or torn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import order

ROOT = Path(__file__).parent.parent


def test_the_long_files_are_there() -> None:
    assert [file for file in order.SECONDS if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("workers", [2, 3])
def test_every_share_begins_with_long_files(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SECONDS", {"m": 90, "z": 60, "b": 50})
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(workers))
    items: list[Any] = [SimpleNamespace(nodeid=f"{file}::{n}") for file in "abcmxyz" for n in range(3)]
    found = [item.nodeid for item in order.longest_first(items)]
    assert sorted(found) == sorted(item.nodeid for item in items)
    files = [name.partition("::")[0] for name in found]
    dealt = {2: [["m"], ["z", "b"]], 3: [["m"], ["z"], ["b"]]}[workers]
    begin = 0
    for number, expected in enumerate(dealt):  # as pytest-xdist cuts them
        size = (len(items) - begin) // (workers - number)
        share = files[begin : begin + size]
        assert list(dict.fromkeys(share))[: len(expected)] == expected
        begin += size
    for file in "mzb":
        assert [name for name in found if name[0] == file] == [f"{file}::{n}" for n in range(3)]


@pytest.mark.parametrize("workers", [1, 2])
def test_few_tests_and_one_process_change_nothing(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(workers))
    long = next(iter(order.SECONDS))
    few: list[Any] = [SimpleNamespace(nodeid=f"{long}::{n}") for n in range(5)]
    assert order.longest_first(few) == few
    many: list[Any] = [SimpleNamespace(nodeid=f"another.py::{n}") for n in range(9)] + few
    assert (order.longest_first(many) == many) is (workers == 1)

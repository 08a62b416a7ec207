"""The simulation of balanced lengths: its shares by hand, its bound, and what a run recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tools.runs import sample, write_run
from tools.bench import balance
from tools.bench.command import main


def test_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4, 4, 2 and 2: in turn 6 and 6; of 4, 2, 4, 2 it is 8 and 4, a quarter of 2 x 8 is waited."""
    monkeypatch.setattr(balance, "PROMPT", 0)
    monkeypatch.setattr(balance, "MINI_BATCHES", 1)

    def shares(*lengths: int) -> dict[str, float]:
        return balance.idle(lambda *_: np.array(lengths)[:, None], float, 2, 2, 1)

    assert shares(4, 4, 2, 2) == pytest.approx({"in turn": 0, "by tokens": 0, "by work": 0, "bound": 0})
    assert shares(4, 2, 4, 2) == pytest.approx({"in turn": 0.25, "by tokens": 0, "by work": 0, "bound": 0})
    assert shares(9, 1, 1, 1) == pytest.approx({"in turn": 0.4, "by tokens": 1 / 3, "by work": 1 / 3, "bound": 1 / 3})


def test_work_is_not_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squared: 36 against 18 + 8 where tokens alone would put a 2 beside the 6."""
    monkeypatch.setattr(balance, "PROMPT", 0)
    monkeypatch.setattr(balance, "MINI_BATCHES", 1)
    lengths = np.array([6, 3, 3, 2, 2, 0])[:, None]
    found = balance.idle(lambda *_: lengths, lambda tokens: float(tokens**2), 2, 3, 1)
    assert found["by work"] == pytest.approx(1 - 62 / 72) and found["by tokens"] == pytest.approx(1 - 62 / 80)
    assert found["bound"] == found["by work"]  # the costliest group alone


def test_balance_is_near_its_bound_where_a_rank_has_several_groups(tmp_path: Path) -> None:
    assert main(["balance", "--ranks", "8", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "balance.json").read_text())["rows"]
    assert [row["groups"] for row in rows] == [1, 2, 4, 8, 16]
    for row in rows:
        assert row["bound"] <= row["by work"] + 1e-12 and row["by work"] <= row["by tokens"] + 0.01
    assert rows[0]["in turn"] == pytest.approx(rows[0]["by work"])  # one group each: nothing to choose
    assert all(row["by work"] < row["in turn"] / 2 for row in rows[2:]) and rows[4]["by work"] < 0.02


def test_lengths_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    draw = balance.recorded(run)
    assert set(draw(np.random.default_rng(0), 5, 2).flat) == {len(sample()["tokens"])}
    assert main(["balance", "--ranks", "2", "--lengths", str(run), "--out", str(tmp_path)]) == 0
    assert main(["balance", "--lengths", str(tmp_path / "none")]) == 2
    assert "expected the responses that a run recorded" in capsys.readouterr().err
    (run / "samples.jsonl").write_text("")
    assert main(["balance", "--lengths", str(run)]) == 2
    assert "holds no response; set log.samples above 0" in capsys.readouterr().err

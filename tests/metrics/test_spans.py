"""Idle shares of two ranks, worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.metrics.spans import (
    BESIDE,
    WAITING,
    Span,
    beside_and_waited,
    busy_seconds,
    idle_share,
    idle_shares,
    phase_idle_share,
)

FAST = [Span("rollout", 0, 2), Span(WAITING, 3, 5), Span("reward", 2, 5), Span(WAITING, 8, 9), Span("update", 5, 10)]
SLOW = [Span("rollout", 0, 4), Span(WAITING, 5, 5), Span("reward", 4, 5), Span("update", 5, 10)]


def test_a_rank_is_busy_in_a_phase_but_for_its_waits_there() -> None:
    assert [busy_seconds(FAST, phase) for phase in ("rollout", "reward", "update", "save")] == [2, 1, 4, 0]
    across = [Span("update", 0, 4), Span("critic", 4, 6), Span(WAITING, 3, 5)]  # a wait counts where it falls
    assert [busy_seconds(across, phase) for phase in ("update", "critic")] == [3, 1]
    twice = [Span("rollout", 0, 1), Span("rollout", 3, 5), Span(WAITING, 1, 3)]
    assert busy_seconds(twice, "rollout") == 3


def test_idle_shares_by_hand() -> None:
    """Of two ranks that work 10 and 6 seconds, 4 of 20 seconds are waited."""
    assert idle_share([10, 6]) == pytest.approx(0.2)
    assert idle_share([3, 3]) == 0 and idle_share([0, 0]) == 0 and idle_share([0, 4]) == 0.5


def test_the_idle_shares_of_a_step() -> None:
    """Rollouts of 2 and 4 s, rewards of 1 and 1, updates of 4 and 5; 3 of 2 x 10 s are waited."""
    found = idle_shares([FAST, SLOW])
    assert found == pytest.approx(
        {"time/idle/rollout": 0.25, "time/idle/reward": 0, "time/idle/update": 0.1, "time/idle/step": 0.15}
    )


def test_what_is_generated_beside_training_is_no_work_of_the_rank() -> None:
    """A rollout in turn of 1 s; one beside training of 6 and 7 s, of which the ranks wait for 1 and 2."""
    turn = [Span("rollout", 0, 1), Span(BESIDE, 1, 7), Span("update", 1, 6), Span(WAITING, 4, 5), Span("rollout", 6, 7)]
    late = [Span("rollout", 0, 1), Span(BESIDE, 1, 8), Span("update", 1, 6), Span("rollout", 6, 8)]
    assert beside_and_waited(turn) == (6, 1) and beside_and_waited(late) == (7, 2)
    assert beside_and_waited(FAST) == (0, 0)
    assert busy_seconds(turn, BESIDE) == 6  # a wait of the step's own does not shorten it
    assert idle_shares([turn, late]) == pytest.approx({"time/idle/update": 0.1, "time/idle/step": 1 / 16})
    assert phase_idle_share([turn, late], "rollout") is None and phase_idle_share([turn, late], BESIDE) is None
    assert phase_idle_share([FAST, SLOW], "rollout") == 0.25


def test_one_rank_has_nobody_to_wait_for() -> None:
    assert idle_shares([SLOW]) == {} and idle_shares([[], []]) == {}


def test_spans_need_no_torch() -> None:
    code = "import sys; import megatron_ext.metrics.spans; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0

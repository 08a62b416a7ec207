"""Clip-Higher and overlong shaping against the equations."""

from __future__ import annotations

import pytest
import torch

from tests.methods.cases import OPTIONS, Case, clipped, close, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_without_shaping_the_loss_is_grpo_with_two_bounds(case: Case) -> None:
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.28)[case.tokens].mean()
    assert close(run(case, {"name": "clip_higher"}), loss, case)


def test_equal_bounds_are_grpo(case: Case) -> None:
    higher = run(case, {"name": "clip_higher", "clip_high": 0.2})
    assert torch.equal(higher.gradient, run(case, {"name": "grpo", "aggregation": "token-mean"}).gradient)


def test_overlong_shaping_changes_the_reward_before_the_group_is_normalised(case: Case) -> None:
    # Lmax 9, Lbuf 6: no penalty up to 3 tokens, -1/6 at 4, ..., -1 at 9
    penalty = [0, 0, 0, 0, -1 / 6, -2 / 6, -3 / 6, -4 / 6, -5 / 6, -1]
    shaped = torch.tensor([float(r) + penalty[int(n)] for r, n in zip(case.reward, case.lengths, strict=True)])
    advantage = case.advantages(reward=shaped.double())
    assert {0.0, -1.0} <= {penalty[int(n)] for n in case.lengths}
    found = run(case, OPTIONS["clip_higher"])
    assert close(found, clipped(case.ratio, advantage, 0.2, 0.28)[case.tokens].mean(), case)
    long = sum(int(case.lengths[i]) > 3 for i in case.valid)
    assert found.observed["overlong/share"] == pytest.approx(long / len(case.valid))

"""MAI's adaptive clip: the loss and the estimate of entropy against their equations, the bound update by update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods.mai_clip import MAIClip
from tests.methods.cases import OPTIONS, TWO_RANKS, Case, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def reference(case: Case, e: float, k: float, r_max: float) -> Tensor:
    """Equations 5, 6 and 9: the outer clip on every branch, then the trust region."""
    r, a = case.ratio.clamp(0.0, r_max), case.advantages()
    return -torch.min(r * a, r.clamp(1 - e, 1 / (1 - e) + k) * a)[case.tokens].mean()


def test_the_loss_is_its_equation(case: Case) -> None:
    r, a = case.ratio[case.tokens], case.advantages()[case.tokens]
    assert ((a < 0) & (r > 1.4)).any() and ((a > 0) & (r > 1 / 0.9) & (r < 1 / 0.9 + 0.1)).any()
    assert close(run(case, OPTIONS["mai_clip"]), reference(case, 0.1, 0.1, 1.4), case)
    assert close(run(case, OPTIONS["mai_clip"] | {"k_0": 0.0}), reference(case, 0.1, 0.0, 1.4), case)


def test_the_defaults_are_symmetric_in_the_log_ratio_and_stop_at_50(case: Case) -> None:
    method = MAIClip()
    assert (1 - method.clip_low) * (1 + method.high) == pytest.approx(1)
    far = Case()
    far.old = case.old * 3
    assert far.ratio.max() > 50
    assert close(run(far, {"name": "mai_clip"}), reference(far, 0.6, 0.0, 50.0), far)


def test_the_estimate_is_weighted_by_the_ratio(case: Case) -> None:
    found = run(case, OPTIONS["mai_clip"], shares=TWO_RANKS).plans[0].report
    total = sum(float(case.ratio[t]) * -float(case.logp(case.logits)[t]) for t in case.tokens)
    assert found == pytest.approx({"mai_clip/entropy": total / len(case.tokens), "mai_clip/k": 0.1})
    exact = run(case, OPTIONS["mai_clip, entropy"]).plans[0].report
    assert exact["mai_clip/entropy"] == pytest.approx(float(entropy(case.logits)[case.tokens].mean()))


def test_an_update_moves_the_bound_of_the_next_one(case: Case) -> None:
    first = run(case, OPTIONS["mai_clip"]).methods[0]
    assert first.state_dict() == pytest.approx({"high": 1 / 0.9 - 1 + 0.1, "k": 0.2})
    second = run(case, first)
    assert second.plans[0].report["mai_clip/k"] == pytest.approx(0.2)
    assert close(second, reference(case, 0.1, 0.2, 1.4), case)


def ks(method: MAIClip, *entropies: float) -> list[float]:
    found = []
    for measured in entropies:
        method.advance(measured)
        found.append(method.k)
    return found


def test_the_control_by_hand() -> None:
    method = MAIClip(target=0.3, delta=0.25, k_max=0.6)
    found = ks(method, 0.2, 0.2, 0.2, 0.4, 0.3, 0.5, 0.5, 0.5)
    assert found == pytest.approx([0.25, 0.5, 0.6, 0.35, 0.35, 0.1, 0.0, 0.0])


@pytest.mark.parametrize(("measured", "expected"), [(0.2, 0.75), (0.3, 0.5), (0.4, 0.25)])
def test_the_control_is_miles(measured: float, expected: float) -> None:
    """The numbers of its tests: miles/utils/entropy_control.py of LLM360's fork."""
    assert ks(MAIClip(target=0.3, delta=0.25, k_max=1.0, k_0=0.5), measured) == pytest.approx([expected])


def test_the_bound_is_miles() -> None:
    """There eps_clip_high = 1 / (1 - eps_clip) - 1 + k: 1.5 for k = 0 and 1.75 for k = .25 at .6."""
    assert MAIClip().high == pytest.approx(1.5)
    moved: Any = methods.create({"name": "mai_clip", "k_0": 0.25})
    assert moved.clip_high + moved.state_dict()["k"] == pytest.approx(1.75)

"""Entropy advantage against the equation."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.methods.entropy_advantage import psi
from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run


@pytest.mark.parametrize("kappa", [2.0, 1.0])
def test_the_loss_is_its_equation(kappa: float) -> None:
    case = Case()
    a, h = case.advantages(), entropy(case.logits).detach()
    shaped = a + torch.minimum(0.4 * h, a.abs() / kappa)
    assert ((shaped > a) & (a < 0)).any() and (0.4 * h > a.abs() / kappa).any() and (0.4 * h < a.abs() / kappa).any()
    loss = clipped(case.ratio, shaped, 0.2, 0.28)[case.tokens].mean()
    assert close(run(case, OPTIONS["entropy_advantage"] | {"kappa": kappa}), loss, case)


def test_psi_by_hand() -> None:
    found = psi(torch.tensor([1.0, 5.0, 5.0, 5.0]), torch.tensor([2.0, 2.0, -1.0, 0.0]), alpha=0.4, kappa=2.0)
    assert found.tolist() == pytest.approx([0.4, 1.0, 0.5, 0.0])


def test_nothing_is_written_into_the_batch() -> None:
    case = Case()
    first = run(case, OPTIONS["entropy_advantage"])
    assert torch.equal(first.gradient, run(case, OPTIONS["entropy_advantage"]).gradient)

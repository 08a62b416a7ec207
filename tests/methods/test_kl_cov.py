"""KL-Cov against the equation."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.methods.grpo import k3
from tests.methods.cases import OPTIONS, Case, close, run


def reference(case: Case, kl: str) -> torch.Tensor:
    logp, a = case.logp(case.logits), case.advantages()
    values, weights = logp.tolist(), a.tolist()
    mean_logp = sum(values[t] for t in case.tokens) / len(case.tokens)
    mean_a = sum(weights[t] for t in case.tokens) / len(case.tokens)
    cov = {t: (values[t] - mean_logp) * (weights[t] - mean_a) for t in case.tokens}
    penalised = sorted(case.tokens, key=lambda t: -cov[t])[: int(0.2 * len(case.tokens))]
    moved = logp - case.logp(case.old)
    distance = moved.abs() if kl == "abs" else case.ratio - 1 - moved
    penalty = 0.7 * distance[penalised].sum()
    return ((-a * case.ratio)[case.tokens].sum() + penalty) / len(case.tokens)


@pytest.mark.parametrize("kl", ["abs", "k3"])
def test_the_loss_is_its_equation(kl: str) -> None:
    case = Case()
    assert close(run(case, OPTIONS["kl_cov"] | {"kl": kl}), reference(case, kl), case)


def test_the_estimate_is_the_divergence_of_the_new_policy_from_the_old() -> None:
    """Its mean over tokens that the old policy samples: exact, over the whole vocabulary."""
    torch.manual_seed(0)
    old, new = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    assert (new.exp() / old.exp()).log().abs().max() < 2.4  # below the estimate's clamp
    assert torch.allclose((old.exp() * k3(old, new)).sum(), (old.exp() * (old - new)).sum())


def test_before_the_policy_moves_the_penalty_has_no_gradient() -> None:
    case = Case()
    case.old = case.logits.detach()
    with_penalty, without = run(case, OPTIONS["kl_cov"]), run(case, OPTIONS["kl_cov"] | {"kl_coef": 0.0})
    assert torch.equal(with_penalty.gradient, without.gradient)

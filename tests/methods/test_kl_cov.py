"""KL-Cov against the equation."""

from __future__ import annotations

import torch

from tests.methods.cases import OPTIONS, Case, close, run


def reference(case: Case) -> torch.Tensor:
    logp, a = case.logp(case.logits), case.advantages()
    values, weights = logp.tolist(), a.tolist()
    mean_logp = sum(values[t] for t in case.tokens) / len(case.tokens)
    mean_a = sum(weights[t] for t in case.tokens) / len(case.tokens)
    cov = {t: (values[t] - mean_logp) * (weights[t] - mean_a) for t in case.tokens}
    penalised = sorted(case.tokens, key=lambda t: -cov[t])[: int(0.2 * len(case.tokens))]
    penalty = 0.7 * (logp - case.logp(case.old)).abs()[penalised].sum()
    return ((-a * case.ratio)[case.tokens].sum() + penalty) / len(case.tokens)


def test_the_loss_is_its_equation() -> None:
    case = Case()
    assert close(run(case, OPTIONS["kl_cov"]), reference(case), case)


def test_before_the_policy_moves_the_penalty_has_no_gradient() -> None:
    case = Case()
    case.old = case.logits.detach()
    with_penalty, without = run(case, OPTIONS["kl_cov"]), run(case, OPTIONS["kl_cov"] | {"kl_coef": 0.0})
    assert torch.equal(with_penalty.gradient, without.gradient)

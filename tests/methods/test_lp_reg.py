"""Lp-Reg against its equations with the whole vocabulary's divergence, and against the authors' function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.cases import OPTIONS, Case, close, run

KAPPA, RHO, COEF = 0.05, 0.6, 0.7


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def proxy(logits: Tensor) -> Tensor:
    """q ``[T, V]``: what is above kappa times the largest, renormalised; a constant."""
    p = logits.detach().softmax(-1)
    q = torch.where(p > KAPPA * p.amax(-1, keepdim=True), p, 0.0)
    return q / q.sum(-1, keepdim=True)


def held(case: Case) -> list[int]:
    """The rho N least likely tokens, of them those of negative advantage that q has."""
    logp, a, q = case.logp(case.logits).tolist(), case.advantages().tolist(), proxy(case.logits)
    low = sorted(case.tokens, key=lambda t: logp[t])[: int(RHO * len(case.tokens))]
    return [t for t in low if a[t] < 0 and float(q[t, case.token[t]]) > 0]


def policy_loss(case: Case) -> Tensor:
    return -case.advantages() * case.ratio.clamp(0.0, 10.0)


def test_the_loss_is_its_equation_with_the_divergence_over_the_whole_vocabulary(case: Case) -> None:
    chosen, q = held(case), proxy(case.logits)
    assert 3 <= len(chosen) < len([t for t in case.tokens if case.advantages()[t] < 0])
    logp = case.logits.log_softmax(-1)
    terms = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - logp), 0.0)
    divergence = terms.sum(-1)[chosen]
    assert divergence.max() > 0.01
    penalty = COEF * divergence.sum()
    found = run(case, OPTIONS["lp_reg"])
    assert close(found, (policy_loss(case)[case.tokens].sum() + penalty) / len(case.tokens), case)
    assert found.metrics["lp_reg/held"] == len(chosen)
    assert found.metrics["loss/lp_reg"] == pytest.approx(float(penalty) / len(case.tokens))


def test_the_ratio_is_cut_at_ten_for_either_sign() -> None:
    far = Case()
    far.old = far.logits.detach() - 4 * torch.nn.functional.one_hot(far.token, far.logits.shape[1])
    a, r = far.advantages(), far.ratio
    assert all((r[far.tokens][sign * a[far.tokens] > 0] > 10).any() for sign in (1, -1))
    loss = policy_loss(far)[far.tokens].mean()
    assert close(run(far, OPTIONS["lp_reg"] | {"kl_coef": 0.0}), loss, far)


def authors(case: Case, *, coef: float) -> Tensor:
    """The mean over tokens of ``compute_policy_loss_lp_reg`` (github.com/CarlanLark/Lp-Reg-dev), from its equations,
    with the released runs' options: targets of the old policy, only negative samples, k3."""
    at = case.tokens
    a, new, old = case.advantages()[at], case.logp(case.logits)[at], case.logp(case.old)[at]
    target = proxy(case.old)[at, case.token[at]].log()  # theirs is very low where it is minus infinity here
    ratio = (new - old).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.0, 10.0))
    negative = (a < 0).nonzero()[:, 0]
    k = max(1, int(len(negative) * RHO))
    if k > 1:
        chosen = negative[new.detach()[negative].topk(k, largest=False).indices]
        chosen = chosen[new.detach()[chosen] < target[chosen]]
        kl = target[chosen] - new[chosen]
        loss = loss.clone()
        loss[chosen] = -a[chosen] * ratio[chosen] + coef * (kl.exp() - kl - 1).clamp(-10, 10)
    return loss.mean()


def test_the_authors_function_gives_the_same_number(case: Case) -> None:
    expected = authors(case, coef=COEF)
    assert float((expected - policy_loss(case)[case.tokens].mean()).abs()) > 1e-3  # so that something is held
    for scope in ("micro_batch", "mini_batch"):
        options = OPTIONS["lp_reg, authors"] | {"rho": RHO, "kl_coef": COEF, "scope": scope}
        assert close(run(case, options), expected, case)


def test_a_single_token_is_not_held_by_the_authors(case: Case) -> None:
    assert run(case, OPTIONS["lp_reg, authors"] | {"rho": 1e-6}).metrics["lp_reg/held"] == 0
    assert run(case, OPTIONS["lp_reg"] | {"rho": 1e-6}).metrics["lp_reg/held"] <= 1

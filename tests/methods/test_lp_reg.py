"""Lp-Reg against its equations with the whole vocabulary's divergence, and against the authors' function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.cases import OPTIONS, Case, close, run

KAPPAS = (0.05, 0.5)  # at the second one some of the least likely tokens are noise
RHO, COEF = 0.6, 0.7


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def proxy(logits: Tensor, kappa: float) -> Tensor:
    """q ``[T, V]``: what is above kappa times the largest, renormalised; a constant."""
    p = logits.detach().softmax(-1)
    q = torch.where(p > kappa * p.amax(-1, keepdim=True), p, 0.0)
    return q / q.sum(-1, keepdim=True)


def low_and_wrong(case: Case) -> list[int]:
    """The rho N least likely tokens, of them those of negative advantage."""
    logp, a = case.logp(case.logits).tolist(), case.advantages().tolist()
    low = sorted(case.tokens, key=lambda t: logp[t])[: int(RHO * len(case.tokens))]
    return [t for t in low if a[t] < 0]


def policy_loss(case: Case) -> Tensor:
    return -case.advantages() * case.ratio.clamp(0.0, 10.0)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_loss_is_its_equation_with_the_divergence_over_the_whole_vocabulary(kappa: float, case: Case) -> None:
    q, low = proxy(case.logits, kappa), low_and_wrong(case)
    chosen = [t for t in low if float(q[t, case.token[t]]) > 0]
    assert 3 <= len(chosen) < len([t for t in case.tokens if case.advantages()[t] < 0])
    assert (len(chosen) < len(low)) == (kappa == KAPPAS[1])
    logp = case.logits.log_softmax(-1)
    terms = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - logp), 0.0)
    divergence = terms.sum(-1)[chosen]
    assert divergence.max() > 0.01
    penalty = COEF * divergence.sum()
    found = run(case, OPTIONS["lp_reg"] | {"kappa": kappa})
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


def authors(case: Case, *, kappa: float, rho: float = RHO) -> Tensor:
    """The mean over tokens of ``compute_policy_loss_lp_reg`` (github.com/CarlanLark/Lp-Reg-dev), from its equations,
    with the released runs' options: targets of the old policy, only negative samples, k3."""
    at = case.tokens
    a, new, old = case.advantages()[at], case.logp(case.logits)[at], case.logp(case.old)[at]
    target = proxy(case.old, kappa)[at, case.token[at]].log()  # theirs is very low where it is minus infinity here
    ratio = (new - old).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.0, 10.0))
    negative = (a < 0).nonzero()[:, 0]
    k = max(1, int(len(negative) * rho))
    if k > 1:
        chosen = negative[new.detach()[negative].topk(k, largest=False).indices]
        chosen = chosen[new.detach()[chosen] < target[chosen]]
        kl = target[chosen] - new[chosen]
        loss = loss.clone()
        loss[chosen] = -a[chosen] * ratio[chosen] + COEF * (kl.exp() - kl - 1).clamp(-10, 10)
    return loss.mean()


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("scope", ["micro_batch", "mini_batch"])
def test_the_authors_function_gives_the_same_number(scope: str, kappa: float, case: Case) -> None:
    expected = authors(case, kappa=kappa)
    assert float((expected - policy_loss(case)[case.tokens].mean()).abs()) > 1e-3  # so that something is held
    options = OPTIONS["lp_reg, authors"] | {"rho": RHO, "kl_coef": COEF, "kappa": kappa, "scope": scope}
    assert close(run(case, options), expected, case)


def test_a_single_token_is_not_held_by_the_authors() -> None:
    """The least likely one could be: the policy has moved away from it, and it is no noise of the old one."""
    case = Case()
    a, kappa = case.advantages(), 1e-6
    negative = [t for t in case.tokens if a[t] < 0]
    lowest = min(negative, key=lambda t: float(case.logp(case.logits)[t]))
    case.old = case.logits.detach() + 2 * torch.nn.functional.one_hot(case.token, case.logits.shape[1])
    target = proxy(case.old, kappa)[lowest, case.token[lowest]].log()
    assert float(case.logp(case.logits)[lowest]) < float(target)
    options = OPTIONS["lp_reg, authors"] | {"kl_coef": COEF, "kappa": kappa}
    one, two = 1e-6, 2.5 / len(negative)
    for rho, held in ((one, 0), (two, 2)):
        found = run(case, options | {"rho": rho})
        assert found.metrics["lp_reg/held"] == held
        assert close(found, authors(case, kappa=kappa, rho=rho), case)


def test_nothing_is_held_where_the_old_policy_is_the_same_and_has_no_noise() -> None:
    """q is the policy itself then, but for rounding."""
    case = Case()
    case.old = case.logits.detach()
    options = OPTIONS["lp_reg, authors"] | {"rho": RHO, "kappa": 1e-12}
    assert run(case, options).metrics["lp_reg/held"] == 0

"""STEER against its equations, the estimate against the entropy's own derivative, and the authors' function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def omega(case: Case) -> dict[int, float]:
    """At every valid token, by hand."""
    found = {}
    h, logp, a, r = (v.tolist() for v in (entropy(case.logits), case.logp(case.logits), case.advantages(), case.ratio))
    for t in case.tokens:
        stopped = a[t] > 0 and r[t] > 1.28 or a[t] < 0 and r[t] < 0.8
        p = math.exp(logp[t])
        found[t] = 0.0 if stopped else a[t] * r[t] * p * (1 - p) * (logp[t] + h[t])
    return found


def test_the_loss_is_its_equation(case: Case) -> None:
    size = {t: abs(value) for t, value in omega(case).items()}
    largest = max(size.values())
    weight = {t: math.exp(math.log(0.3) * size[t] / largest) for t in size}
    assert min(weight.values()) == pytest.approx(0.3) and 0.0 in size.values()
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.28)
    loss = torch.stack([weight[t] * per_token[t] for t in case.tokens]).sum() / len(case.tokens)
    found = run(case, OPTIONS["steer"])
    assert close(found, loss, case)
    assert found.plans[0].report["steer/largest"] == pytest.approx(largest)
    assert found.metrics["steer/weight"] == pytest.approx(sum(weight.values()))


def test_the_estimate_is_the_change_of_entropy_by_a_step_along_the_tokens_own_logit(case: Case) -> None:
    """-Omega: dH/dz_o times (1 - pi_o) A r, what the surrogate's gradient moves that logit by."""
    leaf = case.logits.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(entropy(leaf).sum(), leaf)
    p, a, r = leaf.detach().softmax(-1), case.advantages(), case.ratio.detach()
    for t, value in omega(case).items():
        o = int(case.token[t])
        if value:
            assert -value == pytest.approx(float(slope[t, o] * (1 - p[t, o]) * a[t] * r[t]), rel=1e-9)


def authors(case: Case, *, least: float, floor: float, c: float) -> Tensor:
    """The mean over tokens of ``compute_policy_loss_with_entropy``, exponential weights (github.com/zz-haooo/STEER),
    from its equations."""
    at = case.tokens
    a, new, old = case.advantages()[at], case.logp(case.logits)[at], case.logp(case.old)[at]
    x = new.detach().exp().clamp(1e-8, 1 - 1e-8)
    metric = (a / old.exp().clamp(1e-8, 1.0) * (x * (1 - x) * (x.log() + entropy(case.old)[at]))).abs()
    k = -torch.tensor(least, dtype=torch.float64).log() / metric.max().clamp(min=floor)
    weight = (-k * metric).exp().clamp(least, 1.0)
    ratio = (new - old).clamp(-20, 20).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.28))
    loss = torch.where(a < 0, torch.min(-a * c, loss), loss)
    return (loss * weight).mean()


@pytest.mark.parametrize("floor", [0.02, 5.0])  # below and above the largest
def test_the_authors_function_gives_the_same_number(floor: float, case: Case) -> None:
    options = OPTIONS["steer, authors"] | {"floor": floor, "scope": "micro_batch"}
    assert close(run(case, options), authors(case, least=0.3, floor=floor, c=1.3), case)

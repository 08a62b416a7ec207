"""CE-GPPO against its equation, its gradient's factor, and the authors' function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.cases import OPTIONS, Case, close, run

CLIP = 0.1


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def factors(case: Case, beta_1: float, beta_2: float) -> dict[int, float]:
    """F of eq. 10 at every valid token."""
    found = {}
    for t in case.tokens:
        a, r = float(case.advantages()[t]), float(case.ratio[t])
        if r < 1 - CLIP and a < 0:
            found[t] = beta_1 * (1 - CLIP)
        elif r > 1 + CLIP and a > 0:
            found[t] = beta_2 * (1 + CLIP)
        else:
            found[t] = r
    return found


def test_the_loss_is_its_equation(case: Case) -> None:
    a, r, n = case.advantages(), case.ratio, len(case.tokens)
    factor = factors(case, 0.5, 0.9)
    assert {0.5 * (1 - CLIP), 0.9 * (1 + CLIP)} <= {*factor.values()}
    loss = sum((-a[t] * factor[t] / r[t].detach() * r[t] for t in case.tokens), torch.zeros(())) / n
    assert close(run(case, OPTIONS["ce_gppo"]), loss, case)


def test_the_gradient_is_that_of_log_probs_times_the_factor(case: Case) -> None:
    factor, a = factors(case, 0.5, 0.9), case.advantages()
    logp = case.logp(case.logits)
    linear = torch.stack([-a[t] * factor[t] * logp[t] for t in case.tokens]).sum() / len(case.tokens)
    expected = case.gradient(linear)
    assert float((run(case, OPTIONS["ce_gppo"]).gradient - expected).norm() / expected.norm()) < 1e-6


def test_without_its_factors_the_gradient_is_that_of_the_clip(case: Case) -> None:
    common = {"aggregation": "token-mean", "clip_low": CLIP, "clip_high": CLIP}
    off = run(case, {"name": "ce_gppo", "beta_1": 0.0, "beta_2": 0.0, **common})
    assert torch.allclose(off.gradient, run(case, {"name": "grpo", **common}).gradient, rtol=1e-12, atol=1e-18)


def authors(old: Tensor, new: Tensor, advantage: Tensor, *, beta_1: float, beta_2: float, c: float) -> Tensor:
    """The mean over tokens of ``compute_gppo_loss_general_beta`` (github.com/Kwai-Klear/CE-GPPO), by its equations."""
    ratio = (new - old).exp()
    low, high = (ratio < 1 - CLIP) & (advantage < 0), (ratio > 1 + CLIP) & (advantage > 0)
    loss = torch.zeros_like(advantage)
    loss[low] = -beta_1 * (1 - CLIP) / ratio.detach()[low] * ratio[low] * advantage[low]
    loss[high] = -beta_2 * (1 + CLIP) / ratio.detach()[high] * ratio[high] * advantage[high]
    loss[~(low | high)] = -ratio[~(low | high)] * advantage[~(low | high)]
    return torch.where(advantage < 0, torch.min(-advantage * c, loss), loss).mean()


def test_the_authors_function_gives_the_same_number(case: Case) -> None:
    at = case.tokens
    old, new = case.logp(case.old)[at], case.logp(case.logits)[at]
    loss = authors(old, new, case.advantages()[at], beta_1=0.5, beta_2=1.0, c=1.3)
    assert (case.ratio[at][case.advantages()[at] < 0] > 1.3).any()  # so that the bound acts
    assert close(run(case, OPTIONS["ce_gppo, authors"]), loss, case)

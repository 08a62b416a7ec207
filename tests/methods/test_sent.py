"""SENT's token part against the equations, the paper's and the authors' variant."""

from __future__ import annotations

import pytest
import torch

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def tiers(case: Case) -> tuple[list[int], list[int]]:
    """The 70 % lowest-entropy tokens, by ascending covariance, and all valid tokens' number."""
    h, logp, a = entropy(case.logits).tolist(), case.logp(case.logits).tolist(), case.advantages().tolist()
    low = sorted(case.tokens, key=lambda t: h[t])[: int(0.7 * len(case.tokens))]
    mean_logp, mean_a = sum(logp[t] for t in low) / len(low), sum(a[t] for t in low) / len(low)
    return sorted(low, key=lambda t: (logp[t] - mean_logp) * (a[t] - mean_a)), case.tokens


def sequence_mean(case: Case, per_token: torch.Tensor) -> torch.Tensor:
    return torch.stack([per_token[list(case.tokens_of(i))].mean() for i in case.valid]).mean()


def test_the_paper(case: Case) -> None:
    low, _ = tiers(case)
    beta = torch.zeros(len(case.token), dtype=torch.float64)
    beta[low] = 0.5
    beta[low[-int(0.2 * len(low)) :]] = 2.0
    gap = case.logp(case.ref) - case.logp(case.logits)
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2) + beta * (gap.exp() - gap - 1)
    assert close(run(case, OPTIONS["sent"]), sequence_mean(case, per_token), case)


def test_the_authors_code(case: Case) -> None:
    low, tokens = tiers(case)
    k = int(0.7 * 0.2 * len(tokens))
    beta = torch.zeros(len(case.token), dtype=torch.float64)
    beta[low[:k]] = 0.05
    beta[low[-k:]] = 0.2
    gap = case.logp(case.ref) - case.logp(case.logits)
    moved = (case.logp(case.logits) - case.logp(case.old)).abs()
    per_token = -case.advantages() * case.ratio + beta * moved + 0.001 * (gap.exp() - gap - 1)
    options = {"variant": "authors", "beta_low": 0.05, "beta_high": 0.2, "beta": 0.001}
    assert close(run(case, OPTIONS["sent"] | options), sequence_mean(case, per_token), case)


def test_without_its_betas_it_is_grpo(case: Case) -> None:
    off = run(case, OPTIONS["sent"] | {"beta_low": 0.0, "beta_high": 0.0})
    assert torch.allclose(off.gradient, run(case, {"name": "grpo"}).gradient, rtol=1e-12, atol=0)


def test_at_least_one_token_is_in_the_high_tier(case: Case) -> None:
    coefficient = run(case, OPTIONS["sent"] | {"cov_ratio": 2e-4}).plans[0].token["coefficient"]
    assert (coefficient == 2.0).sum() == 1

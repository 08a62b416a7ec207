"""SENT's token part against the equations, the paper's and the authors' variant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


def authors(case: Case, low_ratio: float, cov_ratio: float, beta_low: float, beta_high: float) -> Tensor:
    """The loss of each token of ``compute_policy_loss_low_entropy_kl_cov_v2`` (github.com/zldscr0/SENT), ``[T]``, from
    its equations, with covariances of the tokens themselves: theirs are of others, by an integer mask as an index."""
    at = torch.tensor(case.tokens)
    a, new, old = case.advantages()[at], case.logp(case.logits)[at], case.logp(case.old)[at]
    size = max(1, int(len(at) * low_ratio))
    low = entropy(case.logits).detach()[at].topk(size, largest=False).indices
    cov = (a[low] - a[low].mean()) * (new.detach()[low] - new.detach()[low].mean())
    k = max(1, int(size * cov_ratio))
    own = -a * (new - old).exp()
    for largest, beta in ((True, beta_high), (False, beta_low)):  # in this order: the second one stays
        chosen = low[cov.topk(k, largest=largest).indices]
        own = own.index_put((chosen,), (-a * (new - old).exp() + beta * (new - old).abs())[chosen])
    return torch.zeros(len(case.token), dtype=torch.float64).index_put((at,), own)


@pytest.mark.parametrize("cov_ratio", [0.2, 0.7])  # at the second one the two sets meet
def test_the_authors_function_gives_the_same_number(cov_ratio: float, case: Case) -> None:
    size = int(0.7 * len(case.tokens))
    assert (2 * int(cov_ratio * size) > size) == (cov_ratio == 0.7)
    gap = case.logp(case.ref) - case.logp(case.logits)
    per_token = authors(case, 0.7, cov_ratio, 0.05, 0.2) + 0.001 * (gap.exp() - gap - 1)
    options = {"variant": "authors", "beta_low": 0.05, "beta_high": 0.2, "beta": 0.001, "cov_ratio": cov_ratio}
    assert close(run(case, OPTIONS["sent"] | options), sequence_mean(case, per_token), case)


@pytest.mark.parametrize(("low_ratio", "cov_ratio"), [(0.7, 0.2), (0.71, 0.45), (0.83, 0.22)])
def test_the_high_tier_is_a_share_of_the_low_one(low_ratio: float, cov_ratio: float, case: Case) -> None:
    """Of its whole number of tokens: 51 of 72 have 22, where .71 x .45 of 72 would be 23."""
    for variant in ("paper", "authors"):
        options = {"low_ratio": low_ratio, "cov_ratio": cov_ratio, "variant": variant}
        coefficient = run(case, OPTIONS["sent"] | options).plans[0].token["coefficient"]
        assert (coefficient == 2.0).sum() == int(cov_ratio * int(low_ratio * len(case.tokens)))


def test_without_its_betas_it_is_grpo(case: Case) -> None:
    off = run(case, OPTIONS["sent"] | {"beta_low": 0.0, "beta_high": 0.0})
    assert torch.allclose(off.gradient, run(case, {"name": "grpo"}).gradient, rtol=1e-12, atol=0)


def test_at_least_one_token_is_in_the_high_tier(case: Case) -> None:
    coefficient = run(case, OPTIONS["sent"] | {"cov_ratio": 2e-4}).plans[0].token["coefficient"]
    assert (coefficient == 2.0).sum() == 1

"""Forking tokens against the equation, in both scopes."""

from __future__ import annotations

import pytest
import torch

from tests.methods.cases import MAX_LENGTH, OPTIONS, Case, clipped, close, entropy, run

PLAIN = {"name": "forking_tokens", "rho": 0.3}


def top(case: Case, tokens: list[int]) -> list[int]:
    h = entropy(case.logits)
    return sorted(tokens, key=lambda t: -float(h[t]))[: int(0.3 * len(tokens))]


def test_the_loss_is_the_mean_over_the_tokens_kept() -> None:
    case = Case()
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.28)[top(case, case.tokens)].mean()
    assert close(run(case, PLAIN), loss, case)


def test_the_authors_scope_is_a_mean_of_micro_batch_means() -> None:
    case = Case()
    per_token, parts = clipped(case.ratio, case.advantages(), 0.2, 0.28), []
    for start in range(0, len(case.reward), 4):
        rows = [i for i in range(start, min(start + 4, len(case.reward))) if i in case.valid]
        own = top(case, [t for i in rows for t in case.tokens_of(i)])
        parts.append(per_token[own].mean() * len(rows) / len(case.valid))
    assert close(run(case, PLAIN | {"scope": "micro_batch"}, micro_batch=4), torch.stack(parts).sum(), case)


def test_the_first_version_divides_by_all_tokens() -> None:
    case = Case()
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.28)[top(case, case.tokens)].sum() / len(case.tokens)
    assert close(run(case, PLAIN | {"denominator": "all"}), loss, case)


def within(case: Case, i: int) -> list[int]:
    """The tokens of response i above its 70 % quantile, by linear interpolation."""
    h, own = entropy(case.logits).detach(), list(case.tokens_of(i))
    ranked = sorted(float(h[t]) for t in own)
    low, part = divmod(0.7 * (len(own) - 1), 1)
    threshold = ranked[int(low)] + part * (ranked[min(int(low) + 1, len(own) - 1)] - ranked[int(low)])
    return [t for t in own if float(h[t]) > threshold]


@pytest.mark.parametrize("quantile", ["batch", "response"])
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_every_aggregation_is_over_the_tokens_kept(quantile: str, aggregation: str) -> None:
    case = Case()
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.28)
    chosen = top(case, case.tokens)
    kept = {i: within(case, i) for i in case.valid}
    if quantile == "batch":
        kept = {i: [t for t in case.tokens_of(i) if t in chosen] for i in case.valid}
    sums = torch.stack([per_token[kept[i]].sum() for i in case.valid])
    counts = torch.tensor([len(kept[i]) for i in case.valid])
    assert counts.max() > 0 and counts.sum() < len(case.tokens)
    loss = {
        "token-mean": sums.sum() / counts.sum(),
        "seq-mean-token-mean": (sums / counts.clamp(min=1)).mean(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-sum-norm": sums.mean() / MAX_LENGTH,
    }[aggregation]
    assert close(run(case, PLAIN | {"quantile": quantile, "aggregation": aggregation}), loss, case)


def test_overlong_shaping_reaches_the_kept_tokens() -> None:
    case = Case()
    shaped = run(case, OPTIONS["forking_tokens"])
    assert (shaped.gradient - run(case, PLAIN).gradient).norm() > 1e-4

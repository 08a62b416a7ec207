"""Forking tokens against the equation, in both scopes."""

from __future__ import annotations

import torch

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run

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


def test_overlong_shaping_reaches_the_kept_tokens() -> None:
    case = Case()
    shaped = run(case, OPTIONS["forking_tokens"])
    assert (shaped.gradient - run(case, PLAIN).gradient).norm() > 1e-4

"""The naive entropy bonus, with every aggregation of its base, against the equation."""

from __future__ import annotations

import pytest
import torch

from tests.methods.cases import MAX_LENGTH, OPTIONS, Case, clipped, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_on_grpo(case: Case) -> None:
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2) - 0.2 * entropy(case.logits)
    loss = torch.stack([per_token[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    assert close(run(case, OPTIONS["entropy_bonus"]), loss, case)


def test_the_token_mean_beside_a_mean_over_responses(case: Case) -> None:
    policy = clipped(case.ratio, case.advantages(), 0.2, 0.2)
    loss = torch.stack([policy[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    assert close(
        run(case, OPTIONS["entropy_bonus, token"]), loss - 0.2 * entropy(case.logits)[case.tokens].mean(), case
    )


def test_on_dr_grpo_by_three_options(case: Case) -> None:
    per_token = clipped(case.ratio, case.advantages(normalise=False), 0.2, 0.28) - 0.2 * entropy(case.logits)
    loss = torch.stack([per_token[list(case.tokens_of(i))].sum() / MAX_LENGTH for i in case.valid]).mean()
    base = {"aggregation": "seq-mean-token-sum-norm", "normalise": False, "clip_high": 0.28}
    assert close(run(case, OPTIONS["entropy_bonus"] | base), loss, case)

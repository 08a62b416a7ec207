"""NSR, PSR and W-REINFORCE against the equations, including what they drop."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.methods.w_reinforce import WReinforce
from tests.methods.cases import MAX_LENGTH, OPTIONS, Case, clipped, close, run


@pytest.mark.parametrize(("name", "correct", "wrong"), [("nsr", 0, -1), ("psr", 1, 0), ("w_reinforce", 0.1, -1)])
@pytest.mark.parametrize("low_reward", [0.0, -1.0])  # rewards 0/1 and +-1
def test_the_loss_is_the_mean_over_the_rows_kept(name: str, correct: float, wrong: float, low_reward: float) -> None:
    case = Case()
    case.reward = torch.where(case.reward == 0, low_reward, case.reward)
    advantage = torch.tensor([correct if float(r) > 0 else wrong for r in case.reward], dtype=torch.float64)
    kept = [t for t in case.tokens if advantage[case.sequence[t]] != 0]
    loss = clipped(case.ratio, advantage[case.sequence], 0.2, 0.2)[kept].mean()
    found = run(case, OPTIONS[name])
    assert close(found, loss, case)
    assert found.plans[0].report["reinforce/kept_share"] == pytest.approx(len(kept) / len(case.tokens))


def authors_rows(scores: torch.Tensor, kind: str, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage of each response, and which ones train, by the rules of the authors' estimator and trainer
    (RLVR-Decomposed a5d4e7c): a response's return is its score at every token; "negative" takes 1 from it, "weighted"
    multiplies right ones and takes 1 from wrong ones; rows of the other kind are taken out, but of "weighted"."""
    right = scores == 1
    if kind == "positive":
        return scores.clone(), right
    if kind == "negative":
        return scores - 1, ~right
    return torch.where(right, scores * weight, scores - 1), torch.ones_like(right)


@pytest.mark.parametrize(("name", "kind"), [("psr", "positive"), ("nsr", "negative"), ("w_reinforce", "weighted")])
def test_the_advantage_is_the_authors(name: str, kind: str) -> None:
    case = Case(rewards=([1.0, 0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0]))
    advantage, trains = authors_rows(case.reward, kind, 0.1)
    rows = [i for i in range(len(case.reward)) if trains[i]]
    tokens = [t for i in rows for t in case.tokens_of(i)]
    loss = clipped(case.ratio, advantage.double()[case.sequence], 0.2, 0.2)[tokens].mean()
    assert rows and close(run(case, OPTIONS[name]), loss, case)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_a_mean_over_responses_is_over_those_kept(aggregation: str) -> None:
    case = Case()
    per_token = clipped(case.ratio, torch.full((len(case.token),), -1.0, dtype=torch.float64), 0.2, 0.2)
    wrong = [i for i in case.valid if float(case.reward[i]) <= 0]
    divisor = {"seq-mean-token-mean": 0, "seq-mean-token-sum": 1, "seq-mean-token-sum-norm": MAX_LENGTH}[aggregation]
    loss = torch.stack(
        [per_token[list(case.tokens_of(i))].sum() / (divisor or len(case.tokens_of(i))) for i in wrong]
    ).mean()
    assert 0 < len(wrong) < len(case.valid)
    assert close(run(case, OPTIONS["nsr"] | {"aggregation": aggregation}), loss, case)


def test_a_batch_with_nothing_to_keep_has_no_loss() -> None:
    case = Case(rewards=([1.0, 1.0], [1.0]))
    found = run(case, OPTIONS["nsr"])
    assert found.loss == 0 and not found.gradient.any()


def test_both_weights_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="negative: found 0.0, expected a number above 0"):
        WReinforce(positive=0.0, negative=0.0)

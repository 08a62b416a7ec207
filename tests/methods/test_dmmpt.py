"""DMMPT against the equation, with both switches."""

from __future__ import annotations

import pytest

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def mastered(case: Case, sigma: float, batch_mean: bool) -> list[int]:
    h, probability = entropy(case.logits).detach(), case.logp(case.logits).exp()
    result = []
    for i in case.valid:
        mean = h[case.tokens].mean() if batch_mean else h[list(case.tokens_of(i))].mean()
        if case.reward[i] == 1 and mean < sigma:
            result += [t for t in case.tokens_of(i) if probability[t] >= 0.7]
    return result


@pytest.mark.parametrize(("name", "sigma"), [("dmmpt", 1.2), ("dmmpt, batch", 1.45)])
def test_mastered_tokens_have_no_loss_and_stay_in_the_denominator(case: Case, name: str, sigma: float) -> None:
    dropped = mastered(case, sigma, batch_mean=name != "dmmpt")
    kept = [t for t in case.tokens if t not in dropped]
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.2)[kept].sum() / len(case.tokens)
    found = run(case, OPTIONS[name])
    assert close(found, loss, case)
    assert found.metrics["dmmpt/mastered"] == len(dropped) > 0


def test_a_wrong_response_of_reward_minus_1_has_mastered_nothing(case: Case) -> None:
    signed = Case(rewards=[[2 * reward - 1 for reward in group] for group in case.rewards])
    found, same = (run(each, OPTIONS["dmmpt"]).metrics["dmmpt/mastered"] for each in (signed, case))
    assert found == same > 0


def test_the_switches_choose_different_tokens(case: Case) -> None:
    assert set(mastered(case, 1.2, batch_mean=False)) < set(mastered(case, 1.45, batch_mean=True))
    assert mastered(case, 1.2, batch_mean=True) == []
    assert run(case, OPTIONS["dmmpt, batch"] | {"sigma": 1.2}).metrics["dmmpt/mastered"] == 0

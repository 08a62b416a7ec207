"""AEC: the loss against the equation, the coefficient step by step."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.methods.aec import AEC
from megatron_ext.methods.base import Needs, OneRank
from tests.methods.cases import OPTIONS, Case, batch, clipped, close, entropy, run, statistics


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_the_loss_is_its_equation(case: Case) -> None:
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2) - 0.3 * entropy(case.logits)
    assert close(run(case, OPTIONS["aec"]), per_token[case.tokens].mean(), case)


def test_the_bonus_has_the_policy_losss_aggregation(case: Case) -> None:
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2) - 0.3 * entropy(case.logits)
    loss = torch.stack([per_token[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    assert close(run(case, OPTIONS["aec"] | {"aggregation": "seq-mean-token-mean"}), loss, case)


def test_above_the_target_nothing_is_applied(case: Case) -> None:
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.2)[case.tokens].mean()
    assert close(run(case, OPTIONS["aec"] | {"target": 0.1}), loss, case)


def on_step_start(method: AEC, case: Case) -> dict[str, float]:
    return method.on_step_start(batch(case, method), statistics(case, case.old, Needs(entropy=True)), OneRank())


def test_the_coefficient_follows_the_papers_rule(case: Case) -> None:
    low, high = Case(), Case()
    low.old, high.old = case.old * 9, case.old * 0  # entropies near 0 and log V
    method = AEC(target=1.0, delta=0.25, c_max=0.6)
    applied = [
        on_step_start(method, step)["aec/applied"] for step in (low, low, low, low, high, low, high, high, high, high)
    ]
    #         c_k:  0    .25   .5   .6   .6   .35  .6   .35  .1   0
    assert applied == pytest.approx([0, 0.25, 0.5, 0.6, 0, 0.35, 0, 0, 0, 0])
    assert method.state_dict() == pytest.approx({"c": 0.0, "applied": 0.0, "below": False})


def authors_applied(entropies: list[float], target: float, delta: float, largest: float) -> list[float]:
    """What each step applies in the authors' trainer (Skywork-OR1 64e96af, verl/trainer/ppo/ray_trainer.py and
    EntController of core_algos.py), from its two rules: a step is given the controller's value times its switch, which
    is on at first; after it the value moves by delta and is bounded, and the switch is whether entropy was below."""
    value, is_on, given = 0.0, 1, []
    for found in entropies:
        given.append(value * is_on)
        value = min(max(value + (delta if found < target else -delta), 0.0), largest)
        is_on = int(found < target)
    return given


def test_the_authors_gate_is_their_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    entropies = [0.1, 0.1, 0.1, 0.3, 0.3, 0.1, 0.1, 0.3, 0.1, 0.1, 0.2, 0.1]  # at the target it is not below
    expected = authors_applied(entropies, 0.2, 0.25, 0.6)
    assert expected == pytest.approx([0, 0.25, 0.5, 0.6, 0, 0, 0.35, 0.6, 0, 0.6, 0.6, 0])
    case, method, measured = Case(), AEC(target=0.2, delta=0.25, c_max=0.6, gate="previous"), iter(entropies)
    monkeypatch.setattr(AEC, "measured", lambda *_: next(measured))
    assert [on_step_start(method, case)["aec/applied"] for _ in entropies] == pytest.approx(expected)


def test_the_authors_loss_has_the_same_bonus(case: Case) -> None:
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2) - 0.3 * entropy(case.logits)
    assert close(run(case, OPTIONS["aec, authors"]), per_token[case.tokens].mean(), case)


def test_the_measure_is_the_token_mean_of_the_sampling_policy(case: Case) -> None:
    h, logp = entropy(case.old)[case.tokens].mean(), case.logp(case.old)[case.tokens].mean()
    assert on_step_start(AEC(), case)["aec/entropy"] == pytest.approx(float(h))
    assert on_step_start(AEC(measure="logprob"), case)["aec/entropy"] == pytest.approx(-float(logp))

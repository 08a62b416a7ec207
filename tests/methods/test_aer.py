"""AER: the loss against the equation with every ablation, the controller step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.methods.aer import AER
from megatron_ext.methods.base import Needs, OneRank
from tests.methods.cases import OPTIONS, Case, batch, clipped, close, entropy, run, statistics


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def reference(case: Case, coefficient) -> Tensor:
    """GRPO minus the mean over responses of coefficient(accuracy of the group) times the response's mean entropy."""
    policy, h = clipped(case.ratio, case.advantages(), 0.2, 0.2), entropy(case.logits)
    total = torch.zeros((), dtype=torch.float64)
    for i in case.valid:
        group = [j for j in case.valid if case.group[j] == case.group[i]]
        accuracy = sum(float(case.reward[j]) > 0 for j in group) / len(group)
        rows = list(case.tokens_of(i))
        total = total + policy[rows].mean() - coefficient(accuracy) * h[rows].mean()
    return total / len(case.valid)


def test_the_bonus_goes_to_hard_groups(case: Case) -> None:
    assert close(run(case, OPTIONS["aer"]), reference(case, lambda g: 0.4 * max(0, 0.6 - g) / 0.6), case)


def test_a_pivot_of_zero_leaves_the_groups_without_a_correct_response(case: Case) -> None:
    assert close(run(case, OPTIONS["aer"] | {"rho": 0.0}), reference(case, lambda g: 0.4 * (g == 0)), case)


def test_rewards_of_plus_and_minus_one_have_the_same_accuracy(case: Case) -> None:
    signed = Case()
    signed.reward = case.reward * 2 - 1
    plain, other = run(case, OPTIONS["aer"]).plans[0], run(signed, OPTIONS["aer"]).plans[0]
    assert torch.equal(plain.token["bonus"], other.token["bonus"])


def test_without_c1_every_response_has_the_same_coefficient(case: Case) -> None:
    assert close(run(case, OPTIONS["aer"] | {"allocate": False}), reference(case, lambda g: 0.4), case)


def test_the_bonus_does_not_depend_on_the_aggregation(case: Case) -> None:
    plain = run(case, OPTIONS["aer"]).plans[0].token["bonus"]
    assert torch.equal(run(case, OPTIONS["aer"] | {"aggregation": "token-mean"}).plans[0].token["bonus"], plain)


def steps(method: AER, *scales: float) -> list[float]:
    """alpha in force at steps whose entropy is that of the case's old policy with logits times ``scale``."""
    result = []
    for scale in scales:
        case = Case()
        case.old = case.old * scale
        stats = statistics(case, case.old, Needs(entropy=True))
        result.append(method.on_step_start(batch(case, method), stats, OneRank())["aer/alpha"])
    return result


def test_alpha_follows_the_sign_of_the_error_from_the_next_step_on() -> None:
    # scale 1: above the target of .4 H_0; scale 9: below it
    method = AER(eta=0.25)
    assert steps(method, 1, 9, 9, 1, 1, 1, 9) == pytest.approx([0, 0, 0.25, 0.5, 0.25, 0, 0])
    first = float(entropy(Case().old)[Case().tokens].mean())
    assert method.state_dict() == pytest.approx({"alpha": 0.0, "next_alpha": 0.25, "h_0": first})


def test_on_the_target_alpha_stays() -> None:
    assert steps(AER(tau=1.0, alpha_0=0.1), 1, 1, 1) == [0.1, 0.1, 0.1]


def test_without_c2_and_c3_alpha_is_fixed() -> None:
    assert steps(AER(adapt=False, alpha_0=0.1), 1, 9, 9) == [0.1, 0.1, 0.1]

"""PPO against its equations: estimates, whitening, both losses and their gradients, the steps of the critic alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods.base import OneRank
from megatron_ext.methods.ppo import PPO, gae
from tests.methods.cases import OPTIONS, Case, batch, clipped, close, entropy, run

CASE_PENALTY = [0, 0, 0, 0, -1 / 6, -2 / 6, -3 / 6, -4 / 6, -5 / 6, -1]  # by length: Lmax 9, Lbuf 6


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def estimates(case: Case, gamma: float, lam: float, penalty: list[float] | None = None) -> Tensor:
    """sum_k (gamma lam)^k delta_{t+k}, response by response, ``[T]`` in fp64; 0 without a reward."""
    result = torch.zeros(len(case.token), dtype=torch.float64)
    for i in case.valid:
        value = [*case.old_value[list(case.tokens_of(i))].tolist(), 0.0]
        n = len(value) - 1
        reward = [0.0] * (n - 1) + [float(case.reward[i]) + (penalty[n] if penalty else 0.0)]
        delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(n)]
        for t, row in enumerate(case.tokens_of(i)):
            result[row] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
    return result


def whitened(case: Case, advantage: Tensor) -> Tensor:
    own = advantage[case.tokens].tolist()
    mean = sum(own) / len(own)
    variance = sum((a - mean) ** 2 for a in own) / (len(own) - 1)
    result = torch.zeros_like(advantage)
    result[case.tokens] = (advantage[case.tokens] - mean) / math.sqrt(variance + 1e-8)
    return result


def test_estimates_by_hand() -> None:
    # two responses of 3 and 1 tokens, gamma .5, lam .4: gamma lam = .2
    value, sequence = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([0, 0, 0, 1])
    found = gae(torch.tensor([1.0, -1.0]), value, sequence, gamma=0.5, lam=0.4)
    # deltas: .5*2-1 = 0, .5*4-2 = 0, 1-4 = -3; -1-3 = -4
    assert found.tolist() == pytest.approx([-0.12, -0.6, -3.0, -4.0])


def test_without_discount_the_estimate_is_reward_minus_value(case: Case) -> None:
    reward = case.reward.nan_to_num()
    found = gae(reward, case.old_value, case.sequence, gamma=1.0, lam=1.0)
    assert torch.allclose(found, reward.double()[case.sequence] - case.old_value)


def test_the_policy_loss_is_its_equation(case: Case) -> None:
    advantage = whitened(case, estimates(case, 1.0, 1.0))
    found = run(case, {"name": "ppo"})
    assert close(found, clipped(case.ratio, advantage, 0.2, 0.28)[case.tokens].mean(), case)


def test_discount_shaping_and_whitening_are_in_the_policy_loss(case: Case) -> None:
    advantage = estimates(case, 0.9, 0.8, CASE_PENALTY)
    assert close(
        run(case, OPTIONS["ppo"]), clipped(case.ratio, whitened(case, advantage), 0.2, 0.28)[case.tokens].mean(), case
    )
    plain = run(case, OPTIONS["ppo"] | {"normalise": False})
    assert close(plain, clipped(case.ratio, advantage, 0.2, 0.28)[case.tokens].mean(), case)


def test_the_value_loss_is_its_equation(case: Case) -> None:
    returns = estimates(case, 0.9, 0.8, CASE_PENALTY) + case.old_value
    near = torch.min(torch.max(case.value, case.old_value - 0.2), case.old_value + 0.2)
    far, close_by = (case.value - returns) ** 2, (near - returns) ** 2
    assert (close_by > far)[case.tokens].any() and (close_by < far)[case.tokens].any()
    loss = 0.5 * torch.max(far, close_by)[case.tokens].mean()
    [gradient] = torch.autograd.grad(loss, case.value)
    found = run(case, OPTIONS["ppo"])
    assert found.value_loss == pytest.approx(float(loss), rel=1e-6)
    assert float((found.value_gradient - gradient).norm() / gradient.norm()) < 1e-6
    assert found.metrics["loss/value"] == pytest.approx(float(loss), rel=1e-6)
    assert found.metrics["critic/clipped"] == (close_by > far)[case.tokens].sum()


def test_what_is_observed(case: Case) -> None:
    returns = estimates(case, 0.9, 0.8, CASE_PENALTY)[case.tokens] + case.old_value[case.tokens]
    explained = 1 - (returns - case.old_value[case.tokens]).var() / returns.var()
    observed = run(case, OPTIONS["ppo"]).observed
    assert observed["critic/explained_variance"] == pytest.approx(float(explained), rel=1e-6)
    assert observed["critic/return"] == pytest.approx(float(returns.mean()), rel=1e-6)
    assert observed["critic/value"] == pytest.approx(float(case.old_value[case.tokens].mean()), rel=1e-6)


def test_equal_returns_have_no_variance_to_explain() -> None:
    alike = Case(rewards=([1.0, 1.0],))
    assert math.isnan(run(alike, {"name": "ppo"}).observed["critic/explained_variance"])


def test_a_row_without_a_reward_changes_nothing(case: Case) -> None:
    """Nor does its value: it is in no statistic."""
    method = methods.create({"name": "ppo"})
    given = batch(case, method)
    assert given.old_value is not None
    other = method.compute_advantages(
        replace(given, old_value=torch.where(given.mask, given.old_value, 1e3)), OneRank()
    )
    assert torch.equal(given.advantage, other.advantage) and not given.advantage[~given.mask].any()


def test_the_critic_trains_alone_first() -> None:
    method = PPO(critic_only_steps=2)
    updated = []
    for seed in (3, 4, 5):
        method = run(Case(seed), method).methods[0]
        assert isinstance(method, PPO)
        updated.append(method.updates_policy)
    assert updated == [False, False, True] and method.state_dict() == {"step": 3}


def test_entropy_advantage_adds_psi_to_the_whitened_advantage(case: Case) -> None:
    a, h = whitened(case, estimates(case, 1.0, 1.0)), entropy(case.logits).detach()
    shaped = a + torch.minimum(0.1 * h, a.abs() / 2)
    found = run(case, {"name": "entropy_advantage_ppo"})
    assert close(found, clipped(case.ratio, shaped, 0.2, 0.28)[case.tokens].mean(), case)
    assert torch.equal(found.value_gradient, run(case, {"name": "ppo"}).value_gradient)

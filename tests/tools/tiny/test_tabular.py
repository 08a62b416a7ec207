"""The tabular policy against closed forms: what a step is, where P control ends, what the full form can do."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.methods.base import OneRank
from megatron_ext.methods.entropic import EntroPIC
from tools.tiny.tabular import BAD, GOOD, NUM_ACTIONS, NUM_GOOD, SETTINGS, STALE, Setting, enumerated, simulate

DRAW = torch.Generator().manual_seed(0)
SUCCESS = torch.rand(3, 5, generator=DRAW, dtype=torch.float64)
LOGPROB = torch.randn(3, 5, generator=DRAW, dtype=torch.float64).log_softmax(-1)


def expected_gradient(weight: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Gradient of -sum_a w_a A_a log pi_a on the logits of each state, by hand: -(w A - pi sum w A)."""
    product = weight * advantage
    return -(product - LOGPROB.exp() * product.sum(1, keepdim=True)) / len(weight)


def gradient(method: EntroPIC, drawn: torch.Tensor) -> torch.Tensor:
    logits = LOGPROB.clone().requires_grad_()
    batch, stats = enumerated(SUCCESS, logits.log_softmax(-1), drawn)
    plan = method.prepare(batch, stats.detach(), OneRank())
    return torch.autograd.grad(method.loss(batch, stats, plan).sum(), logits)[0]


def test_without_control_the_step_is_the_expected_policy_gradient():
    drawn = 0.9 * LOGPROB.exp() + 0.02
    value = (drawn * SUCCESS).sum(1, keepdim=True)
    advantage = (SUCCESS - value) / (value * (1 - value)).sqrt()
    found = gradient(EntroPIC(k_p=0.0, k_i=0.0), drawn)
    torch.testing.assert_close(found, expected_gradient(drawn, advantage), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("target", [0.01, 2.0])
def test_the_full_form_only_changes_the_speed(target: float):
    method = EntroPIC(target=target, k_p=0.5, k_i=0.0, form="full")
    policy = LOGPROB.exp()
    value = (policy * SUCCESS).sum(1, keepdim=True)
    alpha = 0.5 * (float(-(policy * LOGPROB).sum(1).mean()) - target)
    assert 0.2 < abs(alpha) < 1
    advantage = (SUCCESS - value) * (1 + alpha * (1 - 2 * value)) / (value * (1 - value)).sqrt()
    torch.testing.assert_close(gradient(method, policy), expected_gradient(policy, advantage), rtol=1e-12, atol=1e-15)


def balance(k_p: float, target: float) -> float:
    """Entropy at which P control balances the drift of stale samples when the bad actions have died out.

    With x the likelier good action: drift of its lead (1 - s)(2x - 1)(g - V), control alpha m 2(1 - x) E|A|, m its
    share of the samples, V their mean reward, E|A| = g(1 - V) + (1 - g)V.
    """
    stale = STALE
    value = GOOD - (GOOD - BAD) * stale * (NUM_ACTIONS - NUM_GOOD) / NUM_ACTIONS
    magnitude = GOOD * (1 - value) + (1 - GOOD) * value

    def excess(x: float) -> float:
        entropy = -x * math.log(x) - (1 - x) * math.log(1 - x)
        share = (1 - stale) * x + stale / NUM_ACTIONS
        drift = (1 - stale) * (2 * x - 1) * (GOOD - value)
        return drift + k_p * (entropy - target) * share * 2 * (1 - x) * magnitude

    low, high = 0.8, 0.93  # entropy .50 and .25: x grows at the first and shrinks at the second
    assert excess(low) > 0 > excess(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return -low * math.log(low) - (1 - low) * math.log(1 - low)


@pytest.mark.parametrize("k_p", [2.0, 4.0])
def test_off_policy_p_control_ends_where_it_balances_the_drift(k_p: float):
    setting = Setting(lead=3.0, stale=STALE, k_p=k_p, k_i=0.0)
    expected = balance(k_p, setting.target) - setting.target
    assert -0.1 < expected < -0.02
    assert simulate(setting).error == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("start", ["above", "below"])
def test_p_converges_on_policy_and_pi_also_off_policy(start: str):
    first = simulate(SETTINGS[f"P, on-policy, from {start}"])
    assert (first.entropy[0] > first.setting.target) == (start == "above")
    assert abs(first.error) < 0.005 * first.setting.target
    assert abs(simulate(SETTINGS[f"P, off-policy, from {start}"]).error) > 0.05 * first.setting.target
    assert abs(simulate(SETTINGS[f"PI, off-policy, from {start}"]).error) < 0.005 * first.setting.target


def test_reweighted_samples_of_an_older_policy_are_the_policy_s_own():
    """Away from the clip the expected gradient of the reweighted loss is the on-policy one, whatever sampled."""
    drawn = 0.95 * LOGPROB.exp() + 0.01
    logits = LOGPROB.clone().requires_grad_()
    method = EntroPIC(k_p=0.0, k_i=0.0, clip_low=0.99, clip_high=99.0)
    batch, stats = enumerated(SUCCESS, logits.log_softmax(-1), drawn, ratio=True)
    plan = method.prepare(batch, stats.detach(), OneRank())
    found = torch.autograd.grad(method.loss(batch, stats, plan).sum(), logits)[0]
    value = (drawn * SUCCESS).sum(1, keepdim=True)
    advantage = (SUCCESS - value) / (value * (1 - value)).sqrt()
    torch.testing.assert_close(found, expected_gradient(LOGPROB.exp(), advantage), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("start", ["above", "below"])
def test_with_the_ratio_of_theorem_4_3_p_control_converges_here(start: str):
    curve = simulate(SETTINGS[f"P, off-policy with ratio, from {start}"])
    assert abs(curve.error) < 0.005 * curve.setting.target


def test_the_full_form_loses_the_entropy_at_full_output():
    curve = simulate(SETTINGS["PI, on-policy, full form"])
    assert curve.alpha[-1] == -1.0 and curve.error < -0.9 * curve.setting.target

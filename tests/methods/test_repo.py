"""REPO-R and ADAPO: both losses against their equations, both controllers by hand, REPO-R against SkyRL's functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.methods.base import Needs, OneRank, Prepared
from megatron_ext.methods.control import KeepsEntropy
from megatron_ext.methods.repo import ADAPO, REPO
from tests.methods.cases import OPTIONS, Case, batch, clipped, close, entropy, run, statistics


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def mean_of_means(case: Case, per_token: Tensor) -> Tensor:
    return torch.stack([per_token[list(case.tokens_of(i))].mean() for i in case.valid]).mean()


def rescaled(case: Case, log_probability: Tensor, zeta: float) -> Tensor:
    """A' of each token, case by case as the paper's appendix D.2 writes it."""
    result = []
    for a, value in zip(case.advantages().tolist(), log_probability.tolist(), strict=True):
        if a > 0:
            result.append(max(0.0, a * (1 - zeta * value)))
        else:
            result.append(min(0.0, a * (1 + zeta * value)))
    return torch.tensor(result, dtype=torch.float64)


def test_repo_r_is_its_equation(case: Case) -> None:
    logp = case.logp(case.logits).detach()
    advantage = rescaled(case, logp, 0.6)  # .3 doubled: entropy is below 9
    stopped = [t for t in case.tokens if advantage[t] == 0 and case.advantages()[t] < 0]
    assert stopped and (advantage - case.advantages()).abs().max() > 0.1
    loss = mean_of_means(case, clipped(case.ratio, advantage, 0.2, 0.2))
    assert close(run(case, OPTIONS["repo"]), loss, case)


def test_the_centred_form_has_the_exact_mean_of_the_log_prob(case: Case) -> None:
    centred = (case.logp(case.logits) + entropy(case.logits)).detach()
    for zeta_0 in (0.3, 1.9):
        advantage = rescaled(case, centred, 2 * zeta_0)
        loss = mean_of_means(case, clipped(case.ratio, advantage, 0.2, 0.2))
        assert close(run(case, OPTIONS["repo, centred"] | {"zeta_0": zeta_0}), loss, case)
    assert any(advantage[t] == 0 and case.advantages()[t] > 0 for t in case.tokens)


def test_the_full_form_takes_a_part_of_the_log_prob_out_of_the_advantage(case: Case) -> None:
    advantage = case.advantages() - 0.6 * (case.logp(case.logits) + entropy(case.logits)).detach()
    loss = mean_of_means(case, clipped(case.ratio, advantage, 0.2, 0.2))
    assert close(run(case, OPTIONS["repo, full"]), loss, case)


def skyrl_advantages(advantages: Tensor, log_probs: Tensor, zeta: float) -> Tensor:
    """SkyRL's repo_r_rescale_advantages (pull request 1896), written from its equations: it bounds log pi at -20."""
    logp = log_probs.clamp(min=-20.0)
    right, wrong = (advantages * (1 - zeta * logp)).clamp(min=0), (advantages * (1 + zeta * logp)).clamp(max=0)
    return torch.where(advantages > 0, right, torch.where(advantages < 0, wrong, advantages))


@pytest.mark.parametrize("zeta", [0.05, 0.6, -0.05])
def test_the_advantage_is_skyrls(case: Case, zeta: float) -> None:
    method = REPO(zeta_0=zeta, zeta_max=4.0, adapt=False)
    stats = statistics(case, case.logits, method.needs)
    found = method.advantage(batch(case, method), stats, Prepared())
    expected = skyrl_advantages(case.advantages(), stats.logprob.detach(), zeta)
    assert stats.logprob.min() > -20 and not found.requires_grad
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


def skyrl_zeta(zeta: float, entropy: float, target: float, smallest: float, largest: float) -> float:
    """SkyRL's repo_r_update_zeta, written from its rules."""
    if entropy > target and zeta >= 0:
        return zeta / 2 if zeta / 2 >= smallest else -smallest
    if entropy > target:
        return max(-largest, 2 * zeta)
    if entropy < target and zeta >= 0:
        return min(largest, 2 * zeta) if zeta > 0 else smallest
    if entropy < target:
        return zeta / 2 if zeta / 2 <= -smallest else smallest
    return zeta


def zetas(method: REPO, *entropies: float) -> list[float]:
    found = []
    for measured in entropies:
        method.advance(measured, 1.0)
        found.append(method.zeta)
    return found


def test_the_control_of_zeta_by_hand() -> None:
    method = REPO(zeta_0=0.02, zeta_min=0.01, zeta_max=0.05)
    found = zetas(method, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 0.5, 0.5, 1.0)
    assert found == pytest.approx([0.04, 0.05, 0.025, 0.0125, -0.01, -0.02, -0.01, 0.01, 0.01])
    assert zetas(REPO(zeta_0=0.0), 0.5) == [1e-4] and zetas(REPO(zeta_0=0.0), 1.5) == [-1e-4]


def test_the_control_of_zeta_is_skyrls() -> None:
    method, zeta = REPO(), 1e-3
    draw = torch.Generator().manual_seed(1)
    for measured in (0.5 + torch.rand(200, generator=draw).cumsum(0) % 1).tolist():
        method.advance(measured, 1.0)
        zeta = skyrl_zeta(zeta, measured, 1.0, 1e-4, 0.05)
        assert method.zeta == zeta
    assert method.zeta_min <= abs(method.zeta) <= method.zeta_max


def steps(method: KeepsEntropy, *scales: float) -> list[dict[str, float]]:
    """What is reported of steps whose entropy is that of the case's old policy with logits times ``scale``."""
    found = []
    for scale in scales:
        case = Case()
        case.old = case.old * scale
        stats = statistics(case, case.old, Needs(entropy=True))
        found.append(method.on_step_start(batch(case, method), stats, OneRank()))
    return found


def test_the_target_is_the_entropy_of_the_first_step(case: Case) -> None:
    first = float(entropy(case.old)[case.tokens].mean())
    method = REPO(zeta_0=0.01)
    found = steps(method, 1, 1, 9, 0.1)  # lower entropy at 9, higher at .1
    assert [report["repo/zeta"] for report in found] == [0.01, 0.01, 0.02, 0.01]
    assert {report["repo/target"] for report in found} == {method.h_0} and method.h_0 == pytest.approx(first)
    resumed = REPO(zeta_0=0.01)
    resumed.load_state_dict(method.state_dict())
    assert steps(resumed, 9) == steps(method, 9) and resumed.state_dict() == method.state_dict()
    assert resumed.state_dict() == pytest.approx({"h_0": first, "zeta": 0.02})


def test_without_adaptation_zeta_stays() -> None:
    method = REPO(zeta_0=0.02, adapt=False)
    assert [report["repo/zeta"] for report in steps(method, 1, 9, 0.1)] == [0.02] * 3
    assert method.controller is None


def test_adapo_is_dapos_loss_with_another_bound(case: Case) -> None:
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.38)[case.tokens].mean()  # .28 + .1: entropy is below 9
    found = run(case, OPTIONS["adapo"])
    assert close(found, loss, case)
    above = [t for t in case.tokens if case.advantages()[t] > 0 and case.ratio[t] > 1.38]
    assert found.metrics["clip/high"] == len(above) > 0


def test_the_control_of_adapo_by_hand() -> None:
    method = ADAPO(delta=0.05, clip_high_min=0.25, clip_high_max=0.35)
    found = []
    for measured in (0.8, 0.8, 0.95, 1.05, 1.2, 1.2, 1.2, 0.8):  # from .9 to 1 it stays
        method.advance(measured, 1.0)
        found.append(method.high)
    assert found == pytest.approx([0.33, 0.35, 0.35, 0.3, 0.25, 0.25, 0.25, 0.3])


def test_adapo_takes_its_target_from_the_first_step() -> None:
    method = ADAPO()
    assert [report["adapo/clip_high"] for report in steps(method, 1, 9, 0.1)] == pytest.approx([0.28, 0.29, 0.28])
    resumed = ADAPO()
    resumed.load_state_dict(method.state_dict())
    assert steps(resumed, 9) == steps(method, 9) and resumed.state_dict() == method.state_dict()

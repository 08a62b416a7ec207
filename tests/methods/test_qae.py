"""QAE: the loss against the equation, the baseline against its definition and the authors' quantile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.methods.qae import QAE
from tests.methods.cases import OPTIONS, Case, clipped, close, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def smallest(rewards: list[float], k: float) -> float:
    """inf {x: F(x) >= K}: only rewards can be it."""
    return min(x for x in rewards if sum(r <= x for r in rewards) / len(rewards) >= k - 1e-12)


def between(rewards: list[float], k: float) -> float:
    """The authors' ``torch.quantile``."""
    return float(torch.quantile(torch.tensor(rewards, dtype=torch.float64), k))


def reference(case: Case, baseline) -> Tensor:
    """DAPO's loss with (R - b) / (std + 1e-6) for its advantage."""
    advantage = torch.zeros(len(case.reward), dtype=torch.float64)
    for i in case.valid:
        own = [float(case.reward[j]) for j in case.valid if case.group[j] == case.group[i]]
        mean = sum(own) / len(own)
        std = (sum((r - mean) ** 2 for r in own) / max(len(own) - 1, 1)) ** 0.5
        advantage[i] = (float(case.reward[i]) - baseline(own, 0.4)) / (std + 1e-6)
    return clipped(case.ratio, advantage[case.sequence], 0.2, 0.28)[case.tokens].mean()


def test_the_loss_is_its_equation(case: Case) -> None:
    assert close(run(case, OPTIONS["qae"]), reference(case, smallest), case)
    assert close(run(case, OPTIONS["qae, authors"]), reference(case, between), case)


@pytest.mark.parametrize("k", [0.1, 0.2, 0.25, 0.28, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9])
def test_of_right_and_wrong_the_baseline_is_a_threshold_on_accuracy(k: float) -> None:
    """Equation 4, where K G is whole too, also where floating point says that it is more: .28 x 25."""
    for size in (1, 2, 5, 8, 10, 16, 25):
        for right in range(size + 1):
            reward = torch.tensor([1.0] * right + [0.0] * (size - right))
            expected = 0.0 if right / size <= 1 - k + 1e-12 else 1.0
            found = QAE(k=k).baseline(reward, torch.zeros(size, dtype=torch.int64))
            assert (found == expected).all(), (size, right)


def test_without_the_deviation_it_is_the_distance_to_the_baseline() -> None:
    reward, group = torch.tensor([1.0, 0.0, 0.0, 0.5]), torch.zeros(4, dtype=torch.int64)
    assert QAE(normalise=False).advantages(reward, group).tolist() == [1.0, 0.0, 0.0, 0.5]


def test_hard_problems_learn_from_successes_and_easy_ones_from_failures() -> None:
    hard, easy = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    advantage = QAE().advantages(torch.tensor(hard + easy), torch.tensor([0] * 4 + [1] * 4))
    assert advantage.tolist() == pytest.approx([2, 0, 0, 0, 0, 0, 0, -2], rel=1e-4)


@pytest.mark.parametrize("interpolate", [False, True])
def test_any_rewards_in_any_order_and_unknown_ones_left_out(interpolate: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    reward, group = torch.rand(60, generator=draw), torch.randint(0, 9, (60,), generator=draw) * 7
    reward[::7] = torch.nan
    reward[group == 14] = torch.nan
    for k in (0.05, 0.4, 0.5, 0.95):
        found = QAE(k=k, interpolate=interpolate).baseline(reward, group)
        for i in range(60):
            own = [float(r) for r, g in zip(reward, group, strict=True) if g == group[i] and not r.isnan()]
            expected = (between if interpolate else smallest)(own, k) if own else 0.0
            assert float(found[i]) == pytest.approx(expected, rel=1e-6)
    assert not QAE(interpolate=interpolate).advantages(reward, group).isnan().any()


def authors_advantages(scores: Tensor, group: Tensor, quantile_k: float) -> Tensor:
    """compute_grpo_outcome_advantage of junkangwu/QAE, from its equations: the mean's place has the quantile."""
    result = scores.clone()
    for x in group.unique():
        own = scores[group == x]
        baseline, std = torch.quantile(own, quantile_k), own.std()
        if len(own) == 1:
            baseline, std = torch.tensor(0.0), torch.tensor(1.0)
        result[group == x] = (own - baseline) / (std + 1e-6)
    return result


def test_the_advantage_is_the_authors() -> None:
    reward = torch.tensor([1.0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0.5])
    group = torch.tensor([0] * 4 + [1] * 5 + [2] * 7)
    found = QAE(interpolate=True).advantages(reward, group)
    assert torch.allclose(found, authors_advantages(reward, group, 0.4), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, QAE().advantages(reward, group), atol=0.1)

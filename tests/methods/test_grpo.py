"""GRPO and Dr.GRPO: advantages, clipping, KL, aggregations, against numbers and equations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_ext.methods.base import Prepared
from megatron_ext.methods.dr_grpo import DrGRPO
from megatron_ext.methods.grpo import GRPO, k3
from megatron_ext.types import TokenStats
from tests.methods.cases import MAX_LENGTH, OPTIONS, Case, batch, clipped, close, run

NAN = float("nan")


def advantages(method: GRPO, *groups: list[float]) -> list[float]:
    reward = torch.tensor([r for group in groups for r in group])
    return method.advantages(reward, torch.tensor([7 * g for g, group in enumerate(groups) for _ in group])).tolist()


def test_advantages_by_hand() -> None:
    # mean .25, deviations .75 and -.25, variance (.5625 + 3 * .0625) / 3 = .25, standard deviation .5
    assert advantages(GRPO(), [1, 0, 0, 0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert advantages(DrGRPO(), [1, 0, 0, 0]) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages(GRPO(normalise=False), [1, 0, 0, 0]) == advantages(DrGRPO(), [1, 0, 0, 0])


@pytest.mark.parametrize("method", [GRPO(), DrGRPO()])
def test_groups_without_a_comparison_have_no_advantage(method: GRPO) -> None:
    assert advantages(method, [1.0], [0.1, 0.1, 0.1], [0, 0]) == [0.0] * 6


@pytest.mark.parametrize("method", [GRPO(), DrGRPO()])
def test_a_nan_reward_is_left_out_of_its_group(method: GRPO) -> None:
    one, nan, two = advantages(method, [1, NAN, 0], [0, 1])[:3]
    assert [one, two] == advantages(method, [1, 0]) and nan == 0
    assert advantages(method, [NAN, 1.0]) == [0.0, 0.0]


def losses(method: GRPO, ratios: list[float], advantage: float) -> list[float]:
    """Unweighted loss at the first tokens of the case, given their ratios and one advantage."""
    case = Case()
    given = replace(batch(case, method), advantage=torch.full((len(case.token),), advantage))
    shift = torch.zeros(len(case.token), dtype=torch.float64)
    shift[: len(ratios)] = torch.tensor(ratios, dtype=torch.float64).log()
    return method.policy_loss(given, TokenStats(given.old_logprob + shift), Prepared()).tolist()[: len(ratios)]


def test_clipping_by_hand() -> None:
    method = GRPO(clip_low=0.2, clip_high=0.28)
    assert losses(method, [0.5, 1.0, 1.5], 2.0) == pytest.approx([-1.0, -2.0, -2.56])
    assert losses(method, [0.5, 1.0, 1.5], -2.0) == pytest.approx([1.6, 2.0, 3.0])


def test_dual_clip_bounds_negative_advantages_only() -> None:
    method = GRPO(dual_clip=3.0)
    assert losses(method, [0.5, 2.0, 5.0], -2.0) == pytest.approx([1.6, 4.0, 6.0])
    assert losses(method, [0.5, 2.0, 5.0], 2.0) == losses(GRPO(), [0.5, 2.0, 5.0], 2.0)


def test_one_token_cannot_overflow() -> None:
    assert losses(GRPO(), [math.exp(40)], -1.0) == pytest.approx([math.exp(20)])


def test_k3_by_hand_and_clamped() -> None:
    logprob, other = torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-2.0, -1.0, -1.0])
    assert k3(logprob, other).tolist() == pytest.approx([math.exp(-1), math.exp(1) - 2, 10.0])


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_grpo_is_its_equation(case: Case) -> None:
    a, r = case.advantages(), case.ratio
    policy = torch.where(a < 0, torch.minimum(clipped(r, a, 0.2, 0.2), -1.2 * a), clipped(r, a, 0.2, 0.2))
    gap = case.logp(case.ref) - case.logp(case.logits)
    per_token = policy + 0.3 * (gap.exp() - gap - 1).clamp(-10, 10)
    loss = torch.stack([per_token[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    assert close(run(case, OPTIONS["grpo"]), loss, case)


def test_dr_grpo_is_its_equation(case: Case) -> None:
    per_token = clipped(case.ratio, case.advantages(normalise=False), 0.2, 0.28)
    loss = torch.stack([per_token[list(case.tokens_of(i))].sum() / MAX_LENGTH for i in case.valid]).mean()
    assert close(run(case, OPTIONS["dr_grpo"]), loss, case)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_aggregations(case: Case, aggregation: str) -> None:
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2)
    rows = [per_token[list(case.tokens_of(i))] for i in case.valid]
    loss = {
        "token-mean": torch.cat(rows).mean(),
        "seq-mean-token-mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq-mean-token-sum": torch.stack([row.sum() for row in rows]).mean(),
    }[aggregation]
    assert close(run(case, {"name": "grpo", "aggregation": aggregation}), loss, case)


def test_metrics_count_clipped_tokens(case: Case) -> None:
    found = run(case, {"name": "grpo", "clip_low": 0.1, "clip_high": 0.15}).metrics
    r, a = case.ratio.tolist(), case.advantages().tolist()
    assert found["clip/low"] == sum(r[t] < 0.9 and a[t] < 0 for t in case.tokens) > 0
    assert found["clip/high"] == sum(r[t] > 1.15 and a[t] > 0 for t in case.tokens) > 0
    gap = [math.log(r[t]) for t in case.tokens]  # of KL(old || current): the old policy has sampled
    assert found["kl/old"] == pytest.approx(sum(math.exp(g) - g - 1 for g in gap))

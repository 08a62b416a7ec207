"""Entrocraft: both variants against their equations, the range step by step, the authors' advantage on one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods.base import Needs, OneRank, Prepared
from megatron_ext.methods.entrocraft import Entrocraft
from tests.methods.cases import OPTIONS, TWO_RANKS, Case, batch, clipped, close, entropy, run, statistics


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def signed() -> Case:
    """Rewards of +-1."""
    case = Case()
    case.reward = case.reward * 2 - 1
    return case


def members(case: Case, x: int) -> list[int]:
    return [i for i in case.valid if int(case.group[i]) == x]


def accepted(case: Case, m: int, x: int) -> list[int]:
    """S_x of algorithm 1."""
    advantage = case.advantages()
    return [i for i in members(case, x) if m * float(advantage[case.tokens_of(i)[0]]) >= 0]


def reference(case: Case, m: int) -> Tensor:
    """The mean over tokens, with G / |S_x| on the responses of S_x and 0 on the others."""
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2)
    total = torch.zeros((), dtype=torch.float64)
    for x in range(len(case.rewards)):
        kept = accepted(case, m, x)
        for i in kept:
            total = total + per_token[list(case.tokens_of(i))].sum() * len(members(case, x)) / len(kept)
    return total / len(case.tokens)


@pytest.mark.parametrize(("name", "m"), [("entrocraft", -1), ("entrocraft, above", 1)])
def test_the_responses_of_one_sign_are_left_out(case: Case, name: str, m: int) -> None:
    found = run(case, OPTIONS[name], shares=TWO_RANKS)
    assert close(found, reference(case, m), case)
    kept = sum(len(accepted(case, m, x)) for x in range(len(case.rewards)))
    assert 0 < kept < len(case.valid)
    assert found.plans[0].report == pytest.approx({"entrocraft/kept_share": kept / len(case.valid)})
    assert found.observed["entrocraft/direction"] == m


def test_in_groups_of_one_size_it_is_equation_5() -> None:
    """The mean over problems of the mean over S_x; of a response the mean over its tokens."""
    case = Case(rewards=[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2)
    means = [per_token[list(case.tokens_of(i))].mean() for i in range(9)]
    groups = [torch.stack([means[i] for i in accepted(case, -1, x)]).mean() for x in range(3)]
    options = OPTIONS["entrocraft"] | {"aggregation": "seq-mean-token-mean"}
    assert close(run(case, options), torch.stack(groups).mean(), case)


@pytest.mark.parametrize(("below", "m"), [(True, -1), (False, 1)])
def test_the_authors_take_the_reward_of_one_sign_for_the_advantage(signed: Case, below: bool, m: int) -> None:
    advantage = torch.tensor([0.0 if m * r < 0 else float(r) for r in signed.reward.nan_to_num()])[signed.sequence]
    loss = clipped(signed.ratio, advantage.double(), 0.2, 0.2)[signed.tokens].mean()
    options = OPTIONS["entrocraft, authors"] | (OPTIONS["entrocraft"] if below else {})
    assert close(run(signed, options), loss, signed)


def test_within_the_range_both_are_grpo(case: Case) -> None:
    loss = clipped(case.ratio, case.advantages(), 0.2, 0.2)[case.tokens].mean()
    for variant in ("paper", "authors"):
        options = {"name": "entrocraft", "h_low": 0.0, "h_high": 9.0, "anneal_steps": 999, "variant": variant}
        assert close(run(case, options), loss, case)


def test_the_papers_entropy_is_a_mean_over_responses_and_the_authors_one_over_tokens(case: Case) -> None:
    h = entropy(case.old)
    responses = torch.stack([h[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    found = run(case, OPTIONS["entrocraft"], shares=TWO_RANKS).observed["entrocraft/entropy"]
    assert found == pytest.approx(float(responses))
    tokens = run(case, OPTIONS["entrocraft, authors"], shares=TWO_RANKS).observed["entrocraft/entropy"]
    assert tokens == pytest.approx(float(h[case.tokens].mean())) and abs(tokens - found) > 0.01


def test_the_range_sinks_and_then_stays() -> None:
    method, bounds = Entrocraft(anneal_steps=4), []
    for _ in range(6):
        method.advance(0.5)
        bounds += method.bounds()
    expected = [0.55, 0.65, 0.5, 0.6, 0.45, 0.55, 0.4, 0.5, 0.4, 0.5, 0.4, 0.5]
    assert bounds == pytest.approx(expected)


def test_the_direction_by_hand() -> None:
    method = Entrocraft(anneal_steps=2)  # ranges: .5 to .6, then .4 to .5
    found = [method.advance(measured) for measured in (0.45, 0.45, 0.55, 0.35)]
    assert [report["entrocraft/direction"] for report in found] == [-1, 0, 1, -1]
    assert [report["entrocraft/target"] for report in found] == pytest.approx([0.55, 0.45, 0.45, 0.45])
    resumed = Entrocraft(anneal_steps=2)
    resumed.load_state_dict(method.state_dict())
    assert resumed.advance(0.45) == method.advance(0.45) and resumed.state_dict() == {"step": 5, "direction": 0}


def authors_advantages(
    scores: Tensor, group: Tensor, step: int, total: int, measured: float, low: list[float], high: list[float]
) -> Tensor:
    """compute_grpo_range_linear_outcome_advantage of lblaoke/entrocraft, written from its equations, ``[B]``."""
    lower = low[0] + (low[1] - low[0]) * step / total
    upper = high[0] + (high[1] - high[0]) * step / total
    if measured > upper:
        return scores.clamp(min=0)
    if measured < lower:
        return scores.clamp(max=0)
    result = torch.zeros_like(scores)
    for x in group.unique():
        own = scores[group == x]
        result[group == x] = (own - own.mean()) / (own.std() + 1e-6)
    return result


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 9.0])  # high entropy, the old policy's, low entropy
def test_the_advantage_is_the_authors(step: int, scale: float) -> None:
    case = Case(rewards=[[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    case.old = case.old * scale
    low, high = [0.6, 0.4], [1.6, 1.4]
    options = {"h_low": 0.6, "h_low_end": 0.4, "h_high": 1.6, "h_high_end": 1.4, "anneal_steps": 4}
    method: Any = methods.create({"name": "entrocraft", "variant": "authors", **options})
    method.load_state_dict({"step": step - 1, "direction": 0})
    whole, stats = batch(case, method), statistics(case, case.old, Needs(entropy=True))
    measured = method.on_step_start(whole, stats, OneRank())["entrocraft/entropy"]
    expected = authors_advantages(case.reward, case.group, step, 4, measured, low, high)
    found = method.advantage(whole, stats, Prepared())
    assert torch.allclose(found.double(), expected[case.sequence].double(), atol=1e-6)

"""Losses equal verl's own functions, whose numbers ``record_verl.py`` recorded: value, and gradient per token."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods.base import Prepared
from megatron_ext.methods.grpo import k3
from megatron_ext.types import TokenStats
from tests.methods.cases import Case, batch, run
from tests.methods.record_verl import BY_TOKEN, CRITIC, RECORD, RUNS, SURROGATES, VALUE_CLIP, token_advantages


def recorded(name: str) -> tuple[float, Tensor]:
    """verl's loss, and its derivative with respect to each token's log-prob, ``[T]``."""
    theirs = json.loads(RECORD.read_text())[name]
    return theirs["loss"], torch.tensor(theirs["gradient"], dtype=torch.float64)


@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradient_are_verls(name: str) -> None:
    case, (loss, derivative) = Case(), recorded(name)
    ours = run(case, RUNS[name])
    assert ours.loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
    # as a loss linear in the log-probs, verl's derivatives give verl's gradient of the logits
    expected = case.gradient((case.logp(case.logits) * derivative).sum())
    assert expected.norm() > 0
    assert torch.allclose(ours.gradient, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SURROGATES)
def test_advantages_of_tokens_compose_as_in_verl(name: str) -> None:
    case, (loss, derivative) = Case(), recorded(f"{name}; advantages of tokens")
    options: dict[str, Any] = RUNS[name]
    method = methods.create(options)
    whole = replace(batch(case, method), advantage=token_advantages(case))
    logp = case.logp(case.logits).detach().requires_grad_()
    ours = method.loss(whole, TokenStats(logprob=logp), Prepared()).sum()
    [found] = torch.autograd.grad(ours, logp)
    assert float(ours.detach()) == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(found, derivative, rtol=1e-6, atol=1e-7 * float(derivative.abs().max()))


def estimates(name: str) -> Tensor:
    return torch.tensor(json.loads(RECORD.read_text())["estimates"][name], dtype=torch.float64)


@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_of_a_group_are_verls(normalise: bool) -> None:
    """But for a group of one, which has its reward there and none here."""
    case, method = Case(), methods.create({"name": "grpo", "normalise": normalise})
    found, expected = batch(case, method).advantage[case.tokens], estimates(f"relative, {normalise}")
    group = case.group[case.sequence[case.tokens]]
    members = torch.bincount(case.group[case.valid])[group]
    assert torch.allclose(found[members > 1].double(), expected[members > 1], rtol=1e-5, atol=1e-6)
    alone = case.reward[case.sequence[case.tokens]][members == 1]
    assert len(alone) and not found[members == 1].any()


def test_the_critics_advantages_and_loss_are_verls() -> None:
    case, options = Case(), {"name": "ppo", **CRITIC, "value_clip": VALUE_CLIP}
    advantage = batch(case, methods.create(options)).advantage[case.tokens]
    assert torch.allclose(advantage.double(), estimates("whitened"), rtol=1e-5, atol=1e-6)
    found = run(case, options)
    assert found.value_loss == pytest.approx(float(estimates("value loss")), rel=1e-6)
    assert torch.allclose(found.value_gradient, estimates("value gradient"), rtol=1e-6, atol=1e-9)


def test_the_kl_to_the_reference_is_verls() -> None:
    case = Case()
    found = k3(case.logp(case.logits), case.logp(case.ref))[case.tokens]
    assert torch.allclose(found, estimates("k3"), rtol=1e-9, atol=1e-12)


def test_every_part_of_the_recorded_losses_acts_on_the_case() -> None:
    """Some tokens are clipped at either end, and the bound of negative advantages stops others."""
    case = Case()
    a, r = case.advantages()[case.tokens], case.ratio.detach()[case.tokens]
    low, high = RUNS["vanilla"]["clip_low"], RUNS["vanilla"]["clip_high"]
    for part in ((a < 0) & (r < 1 - low), (a > 0) & (r > 1 + high), (a < 0) & (r > RUNS["vanilla"]["dual_clip"])):
        assert part.any()
    for name in SURROGATES:
        counts = run(case, RUNS[name]).metrics
        assert name.startswith("sapo") or (counts["clip/low"] > 0 and counts["clip/high"] > 0), name
    assert {RUNS[name].get("aggregation", BY_TOKEN) for name in SURROGATES} == {BY_TOKEN, "seq-mean-token-mean"}

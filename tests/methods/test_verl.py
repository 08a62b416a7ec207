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
from megatron_ext.types import TokenStats
from tests.methods.cases import Case, batch, run
from tests.methods.record_verl import BY_TOKEN, RECORD, RUNS, SURROGATES, token_advantages


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

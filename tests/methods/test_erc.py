"""ERC against its equation, on the clip and on GPPO, and against the authors' functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run

LOW, HIGH = 0.9, 1.2


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def kept(case: Case) -> list[int]:
    now, before = entropy(case.logits).tolist(), entropy(case.old).tolist()
    return [t for t in case.tokens if LOW < now[t] / before[t] < HIGH]


def test_stopped_tokens_keep_their_value_and_have_no_gradient(case: Case) -> None:
    per_token, inside = clipped(case.ratio, case.advantages(), 0.2, 0.28), kept(case)
    assert 3 < len(inside) < len(case.tokens) - 3
    stopped = [t for t in case.tokens if t not in inside]
    loss = (per_token[inside].sum() + per_token[stopped].detach().sum()) / len(case.tokens)
    found = run(case, OPTIONS["erc"])
    assert close(found, loss, case)
    assert found.metrics["erc/stopped"] == len(stopped)


def test_a_token_that_is_certain_before_and_after_is_not_stopped() -> None:
    """0 over 0 is 1, as in the authors' function."""
    certain = Case()
    peak = 1e4 * torch.nn.functional.one_hot(certain.token, certain.logits.shape[1]).double()
    certain.old, certain.logits = peak, peak.clone().requires_grad_()
    assert not entropy(certain.logits).any()
    assert run(certain, OPTIONS["erc"]).metrics["erc/stopped"] == 0


def test_where_the_policy_has_not_moved_nothing_is_stopped() -> None:
    still = Case()
    still.old = still.logits.detach().clone()
    found = run(still, OPTIONS["erc"])
    assert found.metrics["erc/stopped"] == 0
    assert torch.equal(found.gradient, run(still, {"name": "clip_higher"}).gradient)


def authors(case: Case, *, gppo: bool, c: float) -> Tensor:
    """The mean over tokens of ``compute_policy_loss_grpo_erc`` and, with ``gppo``, of ``compute_policy_loss_gppo_erc``
    (github.com/Kwai-Klear/ERC), from their equations."""
    at = case.tokens
    a, ratio = case.advantages()[at], (case.logp(case.logits) - case.logp(case.old))[at].exp()
    low, high = torch.tensor(0.8, dtype=torch.float64), torch.tensor(1.28, dtype=torch.float64)
    if gppo:
        low, high = low / ratio.detach() * ratio, high / ratio.detach() * ratio
    loss = torch.maximum(-a * ratio, -a * torch.minimum(torch.maximum(ratio, low), high))
    loss = torch.where(a < 0, torch.min(-a * c, loss), loss)
    rho = (entropy(case.logits).detach()[at] + 1e-8) / (entropy(case.old)[at] + 1e-8)
    return torch.where((rho > LOW) & (rho < HIGH), loss, loss.detach()).mean()


def test_the_authors_functions_give_the_same_numbers(case: Case) -> None:
    assert close(run(case, OPTIONS["erc"] | {"dual_clip": 1.3}), authors(case, gppo=False, c=1.3), case)
    assert close(run(case, OPTIONS["erc, preserve"]), authors(case, gppo=True, c=1.3), case)

"""SIREN by hand (mask, quantile, anchor, linearised square) and against the equation, with every ablation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext.methods.base import OneRank, Prepared, quantile_by_sequence
from megatron_ext.methods.siren import SIREN
from megatron_ext.types import Batch, TokenStats
from tests.methods.cases import MAX_LENGTH, OPTIONS, TWO_RANKS, Case, clipped, entropy, nucleus_entropy, run

# Two responses, of 5 and 3 tokens, and their nucleus entropies.
H = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4], dtype=torch.float64)
# tau .6: ranks .6 * 4 = 2.4 of (.1 .3 .5 .7 .9) -> .58;  .6 * 2 = 1.2 of (.2 .4 .8) -> .48
QUANTILES = [0.58, 0.48]
# above: .9 and .7 with mean .8;  .8.  Hbar = (.8 + .8) / 2
SELECTED = [0, 1, 0, 0, 1, 0, 1, 0]
HBAR = 0.8


def two_responses() -> Batch:
    sequence = torch.tensor([0] * 5 + [1] * 3)
    ones = torch.ones(8, dtype=torch.float64)
    return Batch(
        sequence=sequence,
        mask=ones.bool(),
        weight=ones / 8,
        old_logprob=-ones,
        rollout_logprob=-ones,
        ref_logprob=None,
        reward=torch.tensor([1.0, 0.0]),
        advantage=torch.tensor([0.5] * 5 + [-0.5] * 3),
        group=torch.tensor([0, 0]),
        truncated=torch.tensor([False, False]),
        num_sequences=2,
        num_tokens=8,
    )


def stats(h: Tensor) -> TokenStats:
    return TokenStats(logprob=-torch.ones(8, dtype=torch.float64), nucleus_entropy=h)


def test_quantile_and_mask_by_hand() -> None:
    batch = two_responses()
    assert quantile_by_sequence(H, batch.sequence, batch.mask, 0.6, 2).tolist() == pytest.approx(QUANTILES)
    hbar, weight = SIREN(tau=0.6).selected_entropy(batch, H, 2, OneRank())
    assert hbar == pytest.approx(HBAR)
    assert weight.tolist() == pytest.approx([0, 1 / 4, 0, 0, 1 / 4, 0, 1 / 2, 0])
    assert (weight > 0).int().tolist() == SELECTED


def test_the_quantile_of_valid_tokens_agrees_with_torch() -> None:
    case, q = Case(), 0.37
    value, mask = entropy(case.logits).detach(), torch.rand(len(case.token)) < 0.7
    found = quantile_by_sequence(value, case.sequence, mask, q, len(case.reward))
    for i in range(len(case.reward)):
        own = value[[t for t in case.tokens_of(i) if mask[t]]]
        assert float(found[i]) == pytest.approx(float(torch.quantile(own, q)) if len(own) else 0.0)


def test_tokens_that_do_not_train_are_never_selected() -> None:
    batch = two_responses()
    batch = replace(batch, mask=torch.tensor([True, False, True, True, True, False, False, False]))
    # (.1 .3 .5 .7) at rank 1.8 -> .46: .5 and .7 are above; the second response has nothing and counts as 0
    hbar, weight = SIREN(tau=0.6).selected_entropy(batch, H, 2, OneRank())
    assert hbar == pytest.approx((0.5 + 0.7) / 2 / 2)
    assert weight.nonzero()[:, 0].tolist() == [2, 4]


def test_equal_entropies_select_nothing() -> None:
    hbar, weight = SIREN().selected_entropy(two_responses(), torch.zeros(8, dtype=torch.float64), 2, OneRank())
    assert hbar == 0 and not weight.any()


def test_the_anchor_is_measured_once_and_the_square_is_linearised_by_hand() -> None:
    method, batch = SIREN(tau=0.6, coef=0.5), two_responses()
    assert method.on_step_start(batch, stats(H), OneRank())["siren/anchor"] == pytest.approx(HBAR)
    report = method.on_step_start(batch, stats(2 * H), OneRank())
    assert (report["siren/hbar"], report["siren/anchor"]) == pytest.approx((2 * HBAR, HBAR))
    assert report["siren/selected_share"] == pytest.approx(3 / 8)
    prepared = method.prepare(batch, stats(2 * H), OneRank())
    # 2 coef (1.6 - .8) = .8, times the weights 1/4, 1/4, 1/2
    assert prepared.token["regulariser"].tolist() == pytest.approx([0, 0.2, 0, 0, 0.2, 0, 0.4, 0])
    assert prepared.report["loss/siren"] == pytest.approx(0.5 * 0.8**2)
    below = method.prepare(batch, stats(0.5 * H), OneRank()).token["regulariser"]
    assert below.tolist() == pytest.approx([0, -0.1, 0, 0, -0.1, 0, -0.2, 0])  # the square pulls from both sides


def test_the_loss_is_the_policy_loss_and_the_slope_times_the_entropy() -> None:
    method, batch = SIREN(tau=0.6, coef=0.5), two_responses()
    method.load_state_dict({"h_anchor": HBAR})
    prepared = method.prepare(batch, stats(2 * H), OneRank())
    regulariser = method.loss(batch, stats(2 * H), prepared) - batch.weight * method.policy_loss(
        batch, stats(H), Prepared()
    )
    assert regulariser.tolist() == pytest.approx((prepared.token["regulariser"] * 2 * H).tolist())


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def hbar(case: Case, h: Tensor, tau: float | None, responses: list[int]) -> Tensor:
    means = []
    for i in responses:
        own = h[list(case.tokens_of(i))]
        if tau is not None:
            own = own[own.detach() > torch.quantile(own.detach(), tau)]
        means.append(own.mean() if len(own) else own.sum())
    return torch.stack(means).mean()


def same_gradient(found: Tensor, case: Case, loss: Tensor) -> bool:
    expected = case.gradient(loss)
    return float((found - expected).norm() / expected.norm()) < 1e-6


def policy(case: Case) -> Tensor:
    per_token = clipped(case.ratio, case.advantages(normalise=False), 0.2, 0.28)
    return torch.stack([per_token[list(case.tokens_of(i))].sum() / MAX_LENGTH for i in case.valid]).mean()


@pytest.mark.parametrize("nucleus", ["inclusive", "exclusive"])
@pytest.mark.parametrize("tau", [0.6, None])
@pytest.mark.parametrize("top_p_mask", [True, False])
@pytest.mark.parametrize("anchor", [True, False])
def test_the_gradient_is_the_formulas(
    case: Case, nucleus: str, tau: float | None, top_p_mask: bool, anchor: bool
) -> None:
    measure = (lambda logits: nucleus_entropy(logits, 0.8, nucleus)) if top_p_mask else entropy
    now = hbar(case, measure(case.logits), tau, case.valid)
    first = hbar(case, measure(case.old), tau, case.valid)
    loss = policy(case) + 0.7 * ((now - first) ** 2 if anchor else -now)
    options = {"nucleus": nucleus, "peak_mask": tau is not None, "top_p_mask": top_p_mask, "anchor": anchor}
    found = run(case, OPTIONS["siren"] | options)
    assert same_gradient(found.gradient, case, loss)
    assert found.metrics["loss/policy"] == pytest.approx(float(policy(case)), rel=1e-6)
    assert found.plans[0].report["loss/siren"] == pytest.approx(float(loss - policy(case)), rel=1e-6)
    assert found.methods[0].state_dict() == pytest.approx({"h_anchor": float(first)})


def test_the_nucleus_rules_differ_by_the_cutoff_token() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.06, 0.03, 0.01]], dtype=torch.float64).log()
    two = -(0.625 * torch.tensor(0.625).log() + 0.375 * torch.tensor(0.375).log())
    assert nucleus_entropy(logits, 0.79, "inclusive").tolist() == pytest.approx([float(two), 0.0])
    assert nucleus_entropy(logits, 0.79, "exclusive").tolist() == pytest.approx([0.0, 0.0])  # one token; none


def test_the_authors_scope_has_a_square_per_micro_batch(case: Case) -> None:
    h = nucleus_entropy(case.logits, 0.8, "inclusive")
    first = hbar(case, nucleus_entropy(case.old, 0.8, "inclusive"), 0.6, case.valid).detach()
    loss = policy(case)
    for start in range(0, len(case.reward), 4):
        own = [i for i in range(start, min(start + 4, len(case.reward))) if i in case.valid]
        loss = loss + len(own) / len(case.valid) * 0.7 * (hbar(case, h, 0.6, own) - first) ** 2
    found = run(case, OPTIONS["siren"] | {"scope": "micro_batch"}, micro_batch=4)
    assert same_gradient(found.gradient, case, loss)


def authors_entropy(logits: Tensor, p: float) -> Tensor:
    """``efficient_top_p_sampling`` of the authors' actor (github.com/Linn3a/siren, dp_actor.py), from its equations:
    the ranks before the first one at which the mass is p; their likeliest 10,000 tokens are all here."""
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
    cutoff = torch.searchsorted(probs.detach().cumsum(-1), torch.full_like(probs[:, :1], p))
    inside = torch.where(torch.arange(probs.shape[1]) < cutoff, probs, 0.0)
    inside = inside / (inside.sum(-1, keepdim=True) + 1e-12)
    return -(inside * (inside + 1e-12).log()).sum(-1)


def authors_term(case: Case, h: Tensor, rows: list[int], tau: float) -> Tensor:
    """What their actor takes the square of in a micro-batch of ``rows``: ``mask_by_quantile`` with >, then ``agg_loss``
    in its mode seq-mean-token-mean, on padded tensors and by ``nanquantile``."""
    value = case.padded(h)[rows]
    real = case.padded(torch.ones(len(case.token), dtype=torch.float64))[rows].bool()
    bound = torch.nanquantile(value.detach().masked_fill(~real, torch.nan), tau, dim=-1, keepdim=True)
    peak = value.detach() > bound
    return torch.where(peak, value, 0.0).sum(-1).div(peak.sum(-1).clamp(min=1)).mean()


def test_the_authors_actor_has_the_same_gradient(case: Case) -> None:
    h, before = authors_entropy(case.logits, 0.8), authors_entropy(case.old, 0.8)
    first = authors_term(case, before, case.valid, 0.6).detach()
    loss = policy(case)
    for start in range(0, len(case.reward), 4):
        own = [i for i in range(start, min(start + 4, len(case.reward))) if i in case.valid]
        loss = loss + len(own) / len(case.valid) * 0.7 * (authors_term(case, h, own, 0.6) - first) ** 2
    assert float((loss - policy(case)).abs()) > 1e-4
    found = run(case, OPTIONS["siren"] | {"scope": "micro_batch", "nucleus": "exclusive"}, micro_batch=4)
    assert same_gradient(found.gradient, case, loss)
    assert found.methods[0].state_dict()["h_anchor"] == pytest.approx(float(first))


def test_the_anchor_is_over_all_ranks(case: Case) -> None:
    one, [first, second] = run(case, OPTIONS["siren"]).methods[0], run(case, OPTIONS["siren"], shares=TWO_RANKS).methods
    assert first.state_dict() == second.state_dict() == pytest.approx(one.state_dict())

"""EntroPIC: both forms against the equations, and the controller by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods.base import OneRank
from megatron_ext.methods.entropic import EntroPIC
from megatron_ext.types import Batch, TokenStats
from tests.methods.cases import OPTIONS, TWO_RANKS, Case, clipped, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def alpha_of(case: Case, target: float) -> float:
    """PI control at the first mini-batch: the sum over the errors is the present error."""
    error = float(entropy(case.logits)[case.tokens].mean()) - target
    return max(-1.0, min(1.0, 1.0 * error + 0.01 * error))


@pytest.mark.parametrize("clip", [0.2, 0.02])  # at the second one some likely tokens are clipped, but not here
@pytest.mark.parametrize("target", [0.8, 2.1])  # alpha positive, alpha negative
def test_the_high_probability_form(case: Case, target: float, clip: float) -> None:
    a, r, alpha = case.advantages(), case.ratio, alpha_of(case, target)
    high = [t for t in case.tokens if case.logp(case.logits)[t].exp() > 0.6]
    assert 5 < len(high) < len(case.tokens) and 0.1 < abs(alpha) < 1
    beyond = (a[high] * (r[high] - 1 - clip * a[high].sign()) > 0).any()
    assert bool(beyond) == (clip < 0.2)
    base, control = clipped(r, a, clip, clip)[case.tokens], (r * a.abs())[high]
    paper = base.mean() - alpha * control.sum() / len(case.tokens)
    authors = base.mean() - alpha * control.mean()
    own = {"target": target, "clip_low": clip, "clip_high": clip}
    assert close(run(case, OPTIONS["entropic"] | own), paper, case)
    assert close(run(case, OPTIONS["entropic, authors"] | own), authors, case)


@pytest.mark.parametrize("target", [0.8, 2.1])
def test_the_full_form(case: Case, target: float) -> None:
    a, alpha = case.advantages(), alpha_of(case, target)
    factor = torch.where(a > 0, 1 + alpha, torch.where(a < 0, 1 - alpha, 1.0))
    loss = (factor * clipped(case.ratio, a, 0.2, 0.2))[case.tokens].mean()
    assert close(run(case, OPTIONS["entropic, full"] | {"target": target}), loss, case)


def test_unclipped_the_two_forms_are_one_where_every_token_is_likely(case: Case) -> None:
    wide = {"clip_low": 9.0, "clip_high": 99.0, "threshold": 0.0}
    high, full = run(case, OPTIONS["entropic"] | wide), run(case, OPTIONS["entropic, full"] | wide)
    assert high.loss == pytest.approx(full.loss, rel=1e-9)
    assert torch.allclose(high.gradient, full.gradient, rtol=1e-9, atol=1e-12)


def test_without_gains_it_is_grpo(case: Case) -> None:
    off = run(case, OPTIONS["entropic"] | {"k_p": 0.0, "k_i": 0.0})
    assert torch.equal(off.gradient, run(case, {"name": "grpo", "aggregation": "token-mean"}).gradient)


def outputs(method: EntroPIC, *entropies: float) -> list[float]:
    result = []
    for measured in entropies:
        method.advance(measured)
        result.append(method.alpha)
    return result


def test_pi_control_by_hand() -> None:
    method = EntroPIC(target=0.5, k_p=1.0, k_i=0.5)
    #  errors .2, -.1, -.4; sums .2, .1, -.3
    assert outputs(method, 0.7, 0.4, 0.1) == pytest.approx([0.3, -0.05, -0.55])
    assert method.state_dict() == pytest.approx({"integral": -0.3, "alpha": -0.55})


def test_p_control_forgets() -> None:
    assert outputs(EntroPIC(target=0.5, k_i=0.0), 0.7, 0.4, 0.5) == pytest.approx([0.2, -0.1, 0.0])


def test_the_integral_does_not_wind_up_and_the_output_returns_at_once() -> None:
    method = EntroPIC(target=1.0, k_p=1.0, k_i=0.5)
    assert outputs(method, 0.0, 0.0, 0.0, 0.0) == [-1.0] * 4  # -1.5: clipped, the integral stays 0
    assert method.integral == 0.0
    assert outputs(method, 1.1) == pytest.approx([0.1 + 0.05])
    wound = EntroPIC(target=1.0, k_p=1.0, k_i=0.5, scope="micro_batch")  # the authors': it winds up
    assert outputs(wound, 0.0, 0.0, 0.0, 0.0, 1.1) == [-1.0] * 5  # .1 + .5 * -4


def test_a_clipped_output_lets_the_integral_come_back() -> None:
    method = EntroPIC(target=1.0, k_p=0.1, k_i=1.0)
    method.integral = 3.0
    assert outputs(method, 0.5) == [1.0] and method.integral == 2.5


def test_one_integral_for_all_ranks_and_micro_batches(case: Case) -> None:
    error = float(entropy(case.logits)[case.tokens].mean()) - 0.8
    for member in run(case, OPTIONS["entropic"], shares=TWO_RANKS, micro_batch=2).methods:
        assert member.state_dict() == pytest.approx({"integral": error, "alpha": 1.01 * error})


def test_the_authors_scope_moves_by_the_share_of_each_micro_batch_of_its_rank(case: Case) -> None:
    found = run(case, OPTIONS["entropic"] | {"scope": "micro_batch"}, shares=TWO_RANKS, micro_batch=4)
    h, integrals = entropy(case.logits), []
    for first, last in ((0, 7), (7, len(case.reward))):
        own = [i for i in range(first, last) if i in case.valid]
        integral = 0.0
        for start in range(first, last, 4):
            rows = [i for i in range(start, min(start + 4, last)) if i in own]
            error = float(h[[t for i in rows for t in case.tokens_of(i)]].mean()) - 0.8
            integral += error * len(rows) / len(own)
        integrals.append(integral)
    assert [m.state_dict()["integral"] for m in found.methods] == pytest.approx(integrals)


def authors(case: Case, rows: list[int], alpha: float, *, threshold: float, c: float) -> Tensor:
    """``compute_policy_loss_entropic`` (github.com/yk7333/EntroPIC, core_algos.py) of one micro-batch, from its
    equations: verl's clipped loss with its dual clip, and alpha times the mean of -r |A| over the likely tokens."""
    at = [t for i in rows for t in case.tokens_of(i)]
    a, logp, r = case.advantages()[at], case.logp(case.logits)[at], case.ratio[at]
    loss = torch.maximum(-a * r, -a * r.clamp(1 - 0.2, 1 + 0.2))
    loss = torch.where(a < 0, torch.minimum(-a * c, loss), loss)
    likely = logp > math.log(threshold)
    return loss.mean() + alpha * (-r * a.abs())[likely].mean()


def test_the_authors_function_gives_the_same_number_in_each_micro_batch(case: Case) -> None:
    """Its alpha is of what it measured and of the errors before it; its part of the responses weighs its control term,
    as it does its error in the integral."""
    integral, expected, alphas = 0.0, torch.zeros((), dtype=torch.float64), []
    for start in range(0, len(case.reward), 4):
        rows = [i for i in case.valid if start <= i < start + 4]
        own = [t for i in rows for t in case.tokens_of(i)]
        error, share = float(entropy(case.logits)[own].mean()) - 0.8, len(rows) / len(case.valid)
        alphas.append(max(-1.0, min(1.0, error + 0.5 * integral)))
        integral += error * share
        plain = authors(case, rows, 0.0, threshold=0.6, c=1.3)
        control = authors(case, rows, alphas[-1], threshold=0.6, c=1.3) - plain
        expected = expected + plain * len(own) / len(case.tokens) + control * share
    assert len({round(alpha, 6) for alpha in alphas}) == len(alphas) > 3 and max(map(abs, alphas)) > 0.3
    options = {"scope": "micro_batch", "k_i": 0.5, "dual_clip": 1.3}
    found = run(case, OPTIONS["entropic, authors"] | options, micro_batch=4)
    assert close(found, expected, case)
    assert found.methods[0].state_dict()["integral"] == pytest.approx(integral)


def eight_responses(entropies: tuple[float, ...]) -> tuple[Batch, TokenStats]:
    """Of 1, 2, 3, 1, 2, 3, 1 and 2 tokens, each with one entropy on all of its tokens."""
    lengths = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])
    sequence = torch.repeat_interleave(torch.arange(8), lengths)
    zeros = torch.zeros(len(sequence))
    batch = Batch(
        sequence=sequence,
        mask=torch.ones(len(sequence), dtype=torch.bool),
        old_logprob=zeros,
        rollout_logprob=zeros,
        ref_logprob=None,
        reward=torch.tensor([1.0, 0.0] * 4),
        group=torch.zeros(8, dtype=torch.int64),
        truncated=torch.zeros(8, dtype=torch.bool),
        weight=zeros + 1 / 15,
        advantage=zeros + 1,
        num_sequences=8,
        num_tokens=15,
    )
    return batch, TokenStats(logprob=zeros, entropy=torch.tensor(entropies).double()[sequence])


def test_four_micro_batches_of_the_authors_scope_by_hand() -> None:
    """Of 1, 2, 3 and 2 of the 8 responses, at entropies .7, .4, 1.3 and 1.7; target .5, k_p 1, k_i .5.

    error   alpha = error + .5 * integral so far      integral after
      .2     .2                                       .2 / 8             =  .025
     -.1    -.1  + .0125  = -.0875                    .025 - .1 * 2 / 8  =  0
      .8     .8                                       0    + .8 * 3 / 8  =  .3
     1.2    1.2  + .15    = 1.35, clipped to 1        .3   + 1.2 * 2 / 8 =  .6
    """
    method = EntroPIC(target=0.5, k_p=1.0, k_i=0.5, scope="micro_batch")
    batch, stats = eight_responses((0.7, 0.4, 0.4, 1.3, 1.3, 1.3, 1.7, 1.7))
    prepared = method.prepare(batch, None, OneRank())
    found = []
    for rows in (range(1), range(1, 3), range(3, 6), range(6, 8)):
        part, at = batch.select(rows)
        method.loss(part, stats.map(lambda value, at=at: value[at]), prepared.select(at))
        found.append((method.alpha, method.integral))
    assert found == [pytest.approx(pair) for pair in ((0.2, 0.025), (-0.0875, 0.0), (0.8, 0.3), (1.0, 0.6))]
    resumed = EntroPIC(target=0.5, k_p=1.0, k_i=0.5, scope="micro_batch")
    resumed.load_state_dict(method.state_dict())
    batch, stats = eight_responses((0.6,) * 8)
    resumed.loss(batch, stats, resumed.prepare(batch, None, OneRank()))
    assert (resumed.alpha, resumed.integral) == pytest.approx((0.1 + 0.5 * 0.6, 0.6 + 0.1))


def test_the_engines_importance_weighs_both_forms_alike() -> None:
    """With every token likely and nothing clipped the two forms are one loss, corrected or not."""
    batch, stats = eight_responses((0.7,) * 8)
    weighed = replace(batch, importance=torch.linspace(0.5, 1.5, 15), advantage=torch.linspace(-1, 1, 15))
    losses = []
    for form in ("full", "high_probability"):
        options = {"name": "entropic", "target": 0.5, "clip_low": 9.0, "clip_high": 99.0, "threshold": 0.0}
        method = methods.create(options | {"form": form})
        losses.append(method.loss(weighed, stats, method.prepare(weighed, stats, OneRank())))
    assert torch.allclose(losses[0], losses[1]) and losses[0].abs().max() > 0.01

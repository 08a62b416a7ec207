"""Clip-Cov: the equation where the draw takes everybody, and the draw itself."""

from __future__ import annotations

import pytest
import torch

from megatron_ext import methods
from megatron_ext.methods.base import OneRank
from tests.methods.cases import OPTIONS, TWO_RANKS, Case, batch, clipped, close, run, statistics

ALL = OPTIONS["clip_cov"] | {"r": 1.0}
DRAWN = OPTIONS["clip_cov"] | {"r": 0.05, "w_low": -9.0, "w_high": 9.0}


def eligible(case: Case, low: float, high: float, clip: float) -> list[int]:
    logp, a, r = case.logp(case.logits).tolist(), case.advantages().tolist(), case.ratio.tolist()
    mean_logp = sum(logp[t] for t in case.tokens) / len(case.tokens)
    mean_a = sum(a[t] for t in case.tokens) / len(case.tokens)
    within = [t for t in case.tokens if low < (logp[t] - mean_logp) * (a[t] - mean_a) < high]
    return [t for t in within if not (a[t] > 0 and r[t] > 1 + clip or a[t] < 0 and r[t] < 1 - clip)]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("clip", [1.0, 0.1])
@pytest.mark.parametrize("w_high", [3.0, 0.5])  # the second one has tokens above it
def test_eligible_tokens_have_no_loss_and_stay_in_the_denominator(case: Case, clip: float, w_high: float) -> None:
    stopped = eligible(case, 0.1, w_high, clip)
    assert (stopped == eligible(case, 0.1, 99.0, clip)) == (w_high == 3.0)
    kept = [t for t in case.tokens if t not in stopped]
    assert 3 < len(stopped) < len(case.tokens) / 2
    loss = clipped(case.ratio, case.advantages(), clip, clip)[kept].sum() / len(case.tokens)
    found = run(case, ALL | {"clip_low": clip, "clip_high": clip, "w_high": w_high})
    assert close(found, loss, case)
    assert found.metrics["clip_cov/stopped"] == len(stopped)


def test_tokens_already_clipped_are_not_drawn(case: Case) -> None:
    assert len(eligible(case, 0.1, 3.0, 0.1)) < len(eligible(case, 0.1, 3.0, 1.0))


def test_a_share_of_each_micro_batch_is_drawn_in_the_authors_scope(case: Case) -> None:
    wide = ALL | {"r": 0.2, "w_low": -9.0, "w_high": 9.0}
    parts = [
        [t for t in case.tokens if start <= int(case.sequence[t]) < start + 4]
        for start in range(0, len(case.reward), 4)
    ]
    counts = [max(int(0.2 * len(part)), 1) for part in parts if part]
    assert sum(counts) < int(0.2 * len(case.tokens))
    found = run(case, wide | {"scope": "micro_batch"}, micro_batch=4)
    assert found.metrics["clip_cov/stopped"] == sum(counts)


def drawn(case: Case, options: dict, times: int) -> list[list[int]]:
    method = methods.create(options)
    given = batch(case, method)
    current = statistics(case, case.logits.detach(), method.needs)
    plans = [method.prepare(given, current, OneRank()) for _ in range(times)]
    return [prepared.token["stopped"].nonzero()[:, 0].tolist() for prepared in plans]


def test_the_draw_is_uniform_over_the_eligible_tokens(case: Case) -> None:
    pool = eligible(case, -9.0, 9.0, 1.0)
    draws = drawn(case, DRAWN, 600)
    size = int(0.05 * len(case.tokens))
    assert all(len(draw) == size and set(draw) <= set(pool) for draw in draws) and size >= 3
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=len(case.token))[pool].double()
    expected = 600 * size / len(pool)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(pool) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_the_draw_depends_on_the_seed_and_on_the_updates_before_it(case: Case) -> None:
    first, second = drawn(case, DRAWN, 2)
    assert first != second
    assert drawn(case, DRAWN | {"seed": 1}, 1) != [first]
    assert drawn(case, DRAWN, 2) == [first, second]


def test_a_resumed_run_draws_what_it_would_have_drawn(case: Case) -> None:
    first, resumed = methods.create(DRAWN), methods.create(DRAWN)
    run(case, first)
    moved = run(case, first).methods[0]
    resumed.load_state_dict(moved.state_dict())
    assert moved.state_dict() == {"updates": 1}
    assert torch.equal(run(case, moved).gradient, run(case, resumed).gradient)
    assert not torch.equal(run(case, moved).gradient, run(case, first).gradient)


def test_at_least_one_token_is_drawn_and_two_ranks_draw_the_same_ones(case: Case) -> None:
    rare = DRAWN | {"r": 1e-6}
    one, two = run(case, rare), run(case, rare, shares=TWO_RANKS)
    assert torch.equal(one.plans[0].token["stopped"], torch.cat([p.token["stopped"] for p in two.plans]))
    assert one.plans[0].token["stopped"].sum() == 1

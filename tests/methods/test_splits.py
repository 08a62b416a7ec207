"""No split of a mini-batch into ranks and micro-batches changes any method's loss, gradient, state or metrics."""

from __future__ import annotations

import pytest
import torch

from megatron_ext import methods
from tests.methods.cases import OPTIONS, TWO_RANKS, WHOLE, Case, Result, run

# within responses only, which are never split, or by a mean alone, without a square: the same in every scope
UNSCOPED = ("dmmpt", "siren, bonus")
SCOPED = [n for n, options in OPTIONS.items() if hasattr(methods.create(options), "scope") and n not in UNSCOPED]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def distance(one: Result, other: Result) -> float:
    return float((one.gradient - other.gradient).norm() / one.gradient.norm())


@pytest.mark.parametrize("name", OPTIONS)
def test_no_split_changes_anything(name: str, case: Case) -> None:
    whole = run(case, OPTIONS[name])
    for shares, micro_batch in ((WHOLE, 1), (WHOLE, 4), (TWO_RANKS, 99), (TWO_RANKS, 2)):
        split = run(case, OPTIONS[name], shares=shares, micro_batch=micro_batch)
        assert split.loss == pytest.approx(whole.loss, rel=1e-9, abs=1e-12)
        assert distance(whole, split) < 1e-9
        assert torch.allclose(split.value_gradient, whole.value_gradient, rtol=1e-9, atol=1e-12)
        assert split.observed == pytest.approx(whole.observed, rel=1e-9, abs=1e-12)
        assert split.metrics == pytest.approx(whole.metrics, rel=1e-9, abs=1e-12)
        for member in split.methods:
            assert member.state_dict() == pytest.approx(whole.methods[0].state_dict(), rel=1e-12)


@pytest.mark.parametrize("name", SCOPED)
def test_the_scope_of_a_micro_batch_is_the_mini_batch_where_there_is_one(name: str, case: Case) -> None:
    options = OPTIONS[name] | ({"k_i": 0.0} if "entropic" in name else {})  # the authors' integral lags by one
    mini_batch, micro_batch = run(case, options), run(case, options | {"scope": "micro_batch"})
    assert micro_batch.loss == pytest.approx(mini_batch.loss, rel=1e-9)
    assert distance(mini_batch, micro_batch) < 1e-9


@pytest.mark.parametrize("name", SCOPED)
def test_the_scope_of_a_micro_batch_is_seen_where_there_are_several(name: str, case: Case) -> None:
    mini_batch = run(case, OPTIONS[name], micro_batch=4)
    assert distance(mini_batch, run(case, OPTIONS[name] | {"scope": "micro_batch"}, micro_batch=4)) > 1e-4


@pytest.mark.parametrize("name", SCOPED)
def test_a_missing_reduction_is_seen(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(case, OPTIONS[name])
    monkeypatch.setattr("tests.methods.cases.Ranks.exchange", lambda self, rank, value: [value])
    assert distance(whole, run(case, OPTIONS[name], shares=TWO_RANKS)) > 1e-4


def test_the_case_has_every_kind_of_group(case: Case) -> None:
    assert case.reward.isnan().any() and torch.bincount(case.group).min() == 1
    assert len(case.valid) < len(case.reward)

"""EntroPIC: both forms against the equations, and the controller by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.methods.entropic import EntroPIC
from tests.methods.cases import OPTIONS, TWO_RANKS, Case, clipped, close, entropy, run


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def alpha_of(case: Case, target: float) -> float:
    """PI control at the first mini-batch: the sum over the errors is the present error."""
    error = float(entropy(case.logits)[case.tokens].mean()) - target
    return max(-1.0, min(1.0, 1.0 * error + 0.01 * error))


@pytest.mark.parametrize("target", [0.8, 2.1])  # alpha positive, alpha negative
def test_the_high_probability_form(case: Case, target: float) -> None:
    a, r, alpha = case.advantages(), case.ratio, alpha_of(case, target)
    high = [t for t in case.tokens if case.logp(case.logits)[t].exp() > 0.6]
    assert 5 < len(high) < len(case.tokens) and 0.1 < abs(alpha) < 1
    base, control = clipped(r, a, 0.2, 0.2)[case.tokens], (r * a.abs())[high]
    paper = base.mean() - alpha * control.sum() / len(case.tokens)
    authors = base.mean() - alpha * control.mean()
    assert close(run(case, OPTIONS["entropic"] | {"target": target}), paper, case)
    assert close(run(case, OPTIONS["entropic, authors"] | {"target": target}), authors, case)


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
    assert outputs(wound, 0.0, 0.0, 0.0, 0.0, 1.1) == [-1.0] * 5  # .1 + .5 * -3.9


def test_a_clipped_output_lets_the_integral_come_back() -> None:
    method = EntroPIC(target=1.0, k_p=0.1, k_i=1.0)
    method.integral = 3.0
    assert outputs(method, 0.5) == [1.0] and method.integral == 2.5


def test_one_integral_for_all_ranks_and_micro_batches(case: Case) -> None:
    error = float(entropy(case.logits)[case.tokens].mean()) - 0.8
    for member in run(case, OPTIONS["entropic"], shares=TWO_RANKS, micro_batch=2).methods:
        assert member.state_dict() == pytest.approx({"integral": error, "alpha": 1.01 * error})


def test_the_authors_scope_moves_once_per_micro_batch_and_rank(case: Case) -> None:
    found = run(case, OPTIONS["entropic"] | {"scope": "micro_batch"}, shares=TWO_RANKS, micro_batch=4)
    h, integrals = entropy(case.logits), []
    for first, last in ((0, 7), (7, len(case.reward))):
        errors = []
        for start in range(first, last, 4):
            rows = [i for i in range(start, min(start + 4, last)) if i in case.valid]
            errors.append(float(h[[t for i in rows for t in case.tokens_of(i)]].mean()) - 0.8)
        integrals.append(sum(errors))
    assert [m.state_dict()["integral"] for m in found.methods] == pytest.approx(integrals)

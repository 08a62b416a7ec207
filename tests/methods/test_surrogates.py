"""Every surrogate against its equation, in fp64 and with loops over responses; and what each composes with.

The references are written from the papers' equations; ``as_verl_writes_it`` has those of verl's ``core_algos.py`` on
its padded ``[B, L]`` tensors. Nothing is shared with the package.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.methods import METHODS, surrogates
from megatron_ext.methods.base import OneRank, Prepared
from megatron_ext.methods.ce_gppo import Preserving
from megatron_ext.methods.clip_cov import ClipCov
from megatron_ext.methods.steer import STEER
from megatron_ext.types import TokenStats
from tests.methods.cases import OPTIONS, Case, batch, clipped, close, run, statistics

TABLES: dict[str, dict[str, Any]] = {  # at which both ends of each act on the case
    "ppo": {"kind": "ppo"},
    "gspo": {"kind": "gspo", "clip_low": 0.05, "clip_high": 0.1},
    "cispo": {"kind": "cispo", "clip_low": 0.2, "clip_high": 0.3},
    "sapo": {"kind": "sapo", "tau_pos": 2.0, "tau_neg": 3.0},
    "minirl": {"kind": "minirl"},
    "topr": {"kind": "topr"},
    "topr, token": {"kind": "topr", "level": "token"},
}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def per_token(case: Case, name: str) -> Tensor:
    """The loss of each token of the case, ``[T]``, one response after the other."""
    logp, old, a = case.logp(case.logits), case.logp(case.old), case.advantages()
    found: list[Tensor] = [torch.zeros(())] * len(a)
    for i in range(len(case.reward)):
        own = list(case.tokens_of(i))
        moved = [logp[t] - old[t] for t in own]
        whole = sum(moved, torch.zeros((), dtype=torch.float64))
        for t, step in zip(own, moved, strict=True):
            r, constant = step.exp(), math.exp(float(step.detach()))
            if name == "ppo":
                found[t] = clipped(r, a[t], 0.2, 0.2)
            elif name == "gspo":  # the sequence's own objective: every token has 1 / |o| of it, so each can have all
                found[t] = clipped((whole / len(own)).exp(), a[t], 0.05, 0.1)
            elif name == "cispo":
                found[t] = -min(max(constant, 0.8), 1.3) * a[t] * logp[t]
            elif name == "sapo":
                tau = 2.0 if a[t] > 0 else 3.0
                found[t] = -a[t] * (4 / tau) / (1 + (-tau * (r - 1)).exp())
            elif name == "minirl":
                dropped = (a[t] > 0 and constant > 1.27) or (a[t] < 0 and constant < 0.8)
                found[t] = -(0 if dropped else constant) * a[t] * logp[t]
            else:
                product = math.exp(float(whole.detach())) if name == "topr" else constant
                found[t] = -(min(product, 1.0) if a[t] < 0 else 1.0) * a[t] * logp[t]
    return torch.stack(found)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean"])
def test_loss_and_gradient_are_the_equations(name: str, aggregation: str, case: Case) -> None:
    loss = per_token(case, name)
    responses = [loss[list(case.tokens_of(i))] for i in case.valid]
    mean = (
        torch.cat(responses).mean()
        if aggregation == "token-mean"
        else torch.stack([r.mean() for r in responses]).mean()
    )
    options = {"name": "grpo", "surrogate": TABLES[name], "aggregation": aggregation}
    assert close(run(case, options), mean, case)


@pytest.mark.parametrize("name", TABLES)
def test_it_is_the_equations_far_from_the_old_policy_too(name: str) -> None:
    """A response's mean log-ratio is beyond 1 there, and a wrong one's ratio has no bound."""
    far = Case()
    far.old = far.old * 2.5
    moved = far.logp(far.logits).detach() - far.logp(far.old)
    means = [
        float(moved[list(far.tokens_of(i))].mean()) for i in far.valid if far.advantages()[far.tokens_of(i)[0]] < 0
    ]
    assert max(means) > 1.3 and moved.abs().max() < 20
    loss = per_token(far, name)[far.tokens].mean()
    assert close(run(far, {"name": "grpo", "surrogate": TABLES[name], "aggregation": "token-mean"}), loss, far)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "topr, token"])
def test_a_name_is_a_table_with_the_defaults(name: str, case: Case) -> None:
    named = run(case, {"name": "grpo", "surrogate": name})
    table = run(case, {"name": "grpo", "surrogate": {"kind": name} | surrogates.options_of(name)})
    assert named.loss == table.loss and torch.equal(named.gradient, table.gradient)


def test_the_defaults_are_the_papers() -> None:
    assert {kind: surrogates.options_of(kind) for kind in surrogates.KINDS} == {
        "ppo": {},
        "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
        "cispo": {"clip_low": 1.0, "clip_high": 4.0},
        "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
        "minirl": {"clip_low": 0.2, "clip_high": 0.27},
        "topr": {"level": "sequence"},
    }


def as_verl_writes_it(case: Case, name: str, advantage: Tensor, logp: Tensor) -> Tensor:
    """The loss of verl's gspo, cispo or sapo, on tensors padded to ``[B, L]``; aggregated as its function does."""
    mask = torch.zeros(len(case.token), dtype=torch.float64)
    mask[case.tokens] = 1.0
    new, old, a, mask = case.padded(logp), case.padded(case.logp(case.old)), case.padded(advantage), case.padded(mask)
    lengths = mask.sum(-1).clamp(min=1)
    if name == "gspo":
        log_s = ((new - old) * mask).sum(-1) / lengths
        s = (new - new.detach() + log_s.detach()[:, None]).exp()
        loss = torch.maximum(-a * s, -a * s.clamp(1 - 0.05, 1 + 0.1))
    elif name == "cispo":
        loss = -(new - old).exp().clamp(1 - 0.2, 1 + 0.3).detach() * a * new
        return (loss * mask).sum() / mask.sum()
    else:
        tau = torch.where(a > 0, 2.0, 3.0)
        loss = -torch.sigmoid(tau * ((new - old).exp() - 1)) * (4 / tau) * a
    return ((loss * mask).sum(-1) / lengths).sum() / (mask.sum(-1) > 0).sum()


@pytest.mark.parametrize("name", ["gspo", "cispo", "sapo"])
def test_advantages_per_token_compose_as_in_verl(name: str, case: Case) -> None:
    """GSPO's are the token form's: one ratio for a response, an advantage for each token."""
    aggregation = "token-mean" if name == "cispo" else "seq-mean-token-mean"
    method = methods.create({"name": "grpo", "surrogate": TABLES[name], "aggregation": aggregation})
    whole = batch(case, method)
    advantage = torch.randn(len(case.token), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage = torch.where(whole.mask, advantage, 0.0)
    logp = case.logp(case.logits).detach().requires_grad_()
    stats = TokenStats(logprob=logp)
    ours = method.loss(replace(whole, advantage=advantage), stats, Prepared()).sum()
    theirs = as_verl_writes_it(case, name, advantage, logp)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    [found], [expected] = torch.autograd.grad(ours, logp), torch.autograd.grad(theirs, logp)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


RANGE = {"clip_low": 0.2, "clip_high": 0.2}
OTHERS: dict[str, surrogates.Surrogate] = {
    "unclipped": surrogates.Unclipped(**RANGE),
    "dual clip": surrogates.PPO(**RANGE, dual_clip=1.3),
    "preserving": Preserving(**RANGE, beta_1=0.5, beta_2=0.9),
    "preserving, dual clip": Preserving(**RANGE, beta_1=0.5, beta_2=0.9, dual_clip=1.3),
}


@pytest.mark.parametrize("name", [*TABLES, *OTHERS])
def test_the_weight_is_that_of_the_gradient(name: str, case: Case) -> None:
    surrogate = OTHERS.get(name) or surrogates.create(TABLES[name], surrogates.PPO(**RANGE))
    whole = batch(case, methods.create({"name": "grpo"}))
    advantage = whole.advantage.double()
    logp = case.logp(case.logits).detach().requires_grad_()
    [gradient] = torch.autograd.grad(surrogate.loss(whole, logp, advantage).sum(), logp)
    weight = surrogate.weight(whole, logp, advantage)
    assert torch.allclose(gradient, -weight * advantage, rtol=1e-9, atol=1e-12) and not weight.requires_grad
    low, high = surrogate.clipped(whole, logp, advantage)
    assert not (low & high).any()
    if isinstance(surrogate, surrogates.Ranged):
        assert (low & whole.mask).any() and (high & whole.mask).any()
    bound = getattr(surrogate, "dual_clip", None)
    if bound is not None:
        stopped = whole.mask & (advantage < 0) & (logp - whole.old_logprob > math.log(bound))
        assert stopped.any() and not weight[stopped].any()


def test_metrics_count_what_each_surrogate_drops_or_bounds(case: Case) -> None:
    r, a = case.ratio.tolist(), case.advantages().tolist()
    log_r = [math.log(x) for x in r]
    totals = {i: sum(log_r[t] for t in case.tokens_of(i)) for i in case.valid}
    response = case.sequence.tolist()
    s = {t: math.exp(totals[response[t]] / int(case.lengths[response[t]])) for t in case.tokens}
    expected = {
        "gspo": (sum(s[t] < 0.95 and a[t] < 0 for t in case.tokens), sum(s[t] > 1.1 and a[t] > 0 for t in case.tokens)),
        "cispo": (
            sum(r[t] < 0.8 and a[t] != 0 for t in case.tokens),
            sum(r[t] > 1.3 and a[t] != 0 for t in case.tokens),
        ),
        "sapo": (0, 0),
        "minirl": (
            sum(r[t] < 0.8 and a[t] < 0 for t in case.tokens),
            sum(r[t] > 1.27 and a[t] > 0 for t in case.tokens),
        ),
        "topr": (0, sum(totals[response[t]] > 0 and a[t] < 0 for t in case.tokens)),
    }
    for name, (low, high) in expected.items():
        found = run(case, {"name": "grpo", "surrogate": TABLES[name]}).metrics
        assert (found["clip/low"], found["clip/high"]) == (low, high), name
        assert 0 < found["surrogate/weight"] / len(case.tokens) < 2
    assert expected["gspo"][0] > 0 and expected["gspo"][1] > 0 and expected["topr"][1] > 0
    assert "surrogate/weight" not in run(case, {"name": "grpo"}).metrics


def test_on_the_first_update_every_weight_is_one() -> None:
    """The policy has not moved: all surrogates have the gradient of REINFORCE."""
    case = Case()
    case.old = case.logits.detach()
    plain = run(case, {"name": "grpo"})
    for kind in surrogates.KINDS:
        found = run(case, {"name": "grpo", "surrogate": kind})
        assert torch.allclose(found.gradient, plain.gradient, rtol=1e-9, atol=1e-12), kind
        assert found.metrics.get("surrogate/weight", len(case.tokens)) == pytest.approx(len(case.tokens)), kind


def own(name: str) -> dict[str, Any]:
    """Options at which the method acts on the case, without those of its clip range."""
    found = next(options for options in OPTIONS.values() if options["name"] == name)
    return {key: value for key, value in found.items() if not key.startswith("clip_") and key != "dual_clip"}


CLIPS = {"adapo", "ce_gppo", "mai_clip"}  # methods that are a clip of their own


def test_erc_is_a_clip_of_its_own_where_it_preserves() -> None:
    with pytest.raises(ValueError, match="method.surrogate: found 'gspo', expected ppo: this method is a clip"):
        methods.create({"name": "erc", "preserve": True, "surrogate": "gspo"})
    with pytest.raises(ValueError, match="method.surrogate: found {'kind': 'sapo'}, expected ppo"):
        methods.create({"name": "mai_clip", "surrogate": {"kind": "sapo"}})
    for given in ("ppo", {"kind": "ppo"}):
        assert methods.create({"name": "erc", "preserve": True, "surrogate": given})


def test_ce_gppo_reports_the_tokens_beyond_its_range(case: Case) -> None:
    found = run(case, {"name": "ce_gppo", "clip_low": 0.1, "clip_high": 0.1}).metrics
    a, r = case.advantages(), case.ratio
    low = sum(bool(a[t] < 0 and r[t] < 0.9) for t in case.tokens)
    high = sum(bool(a[t] > 0 and r[t] > 1.1) for t in case.tokens)
    assert (found["clip/low"], found["clip/high"]) == (low, high) and low > 0 and high > 0
    assert "surrogate/weight" not in found


def test_steer_sees_the_range_of_every_surrogate(case: Case) -> None:
    """A token whose weight is 0 has no estimated change, and so the whole of its (constant) loss."""
    for options in ({"dual_clip": 1.3}, {"surrogate": TABLES["minirl"]}, {"surrogate": TABLES["gspo"]}):
        method = methods.create({"name": "steer"} | options)
        assert isinstance(method, STEER)
        whole = batch(case, method)
        stats = statistics(case, case.logits, method.needs).detach()
        weight = method.policy_surrogate.weight(whole, stats.logprob, whole.advantage)
        change = method.entropy_change(whole, stats, Prepared())
        stopped = whole.mask & (weight == 0) & (whole.advantage != 0)
        assert stopped.any() and not change[stopped].any(), options
        expected = method.prepare(whole, stats, OneRank()).token["steer"]
        assert bool((expected[stopped] == 1).all()) and float(expected[whole.mask].min()) == pytest.approx(0.7)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_every_surrogate(name: str, case: Case) -> None:
    for kind in surrogates.KINDS:
        if name in CLIPS and kind != "ppo":
            with pytest.raises(ValueError, match="method.surrogate: found '.*', expected ppo: this method is a clip"):
                methods.create(own(name) | {"surrogate": kind})
            continue
        found = run(case, own(name) | {"surrogate": TABLES[kind]})
        assert math.isfinite(found.loss) and found.gradient.isfinite().all() and found.gradient.norm() > 0, kind
        assert all(math.isfinite(value) for value in found.metrics.values()), kind


@pytest.mark.parametrize("name", ["entropy_bonus", "high_entropy_reward", "aec", "aer", "siren", "sent"])
def test_a_methods_own_term_is_the_same_beside_every_surrogate(name: str, case: Case) -> None:
    """Its gradient: the method's without that of the plain policy loss of the same surrogate."""
    method = methods.create(own(name))
    plain = {"name": "grpo", "aggregation": method.aggregation, "normalise": vars(method)["normalise"]}
    ranges = {key: vars(method)[key] for key in ("clip_low", "clip_high")}
    term = run(case, own(name)).gradient - run(case, plain | ranges).gradient
    assert term.norm() > 1e-4
    for kind in set(surrogates.KINDS) - {"ppo"}:
        found = run(case, own(name) | {"surrogate": kind}).gradient - run(case, plain | {"surrogate": kind}).gradient
        assert torch.allclose(found, term, rtol=1e-9, atol=1e-12), kind


def test_clip_cov_chooses_among_the_tokens_that_still_move(case: Case) -> None:
    for kind in ("gspo", "minirl"):
        method = methods.create(own("clip_cov") | {"r": 1.0, "surrogate": TABLES[kind]})
        whole = batch(case, method)
        stats = TokenStats(logprob=case.logp(case.logits).detach())
        stopped = method.prepare(whole, stats, OneRank()).token["stopped"]
        assert isinstance(method, ClipCov)
        low, high = method.policy_surrogate.clipped(whole, stats.logprob, whole.advantage)
        assert stopped.any() and not (stopped & (low | high)).any(), kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "gpso"}, "method.surrogate: found 'gpso', expected 'ppo', 'gspo'"),
        ({"surrogate": {"kind": "gpso"}}, "method.surrogate.kind: found 'gpso'; did you mean gspo?"),
        ({"surrogate": {"clip_low": 0.1}}, "method.surrogate.kind: found None; expected one of cispo, gspo"),
        (
            {"surrogate": {"kind": "gspo", "clip_hihg": 0.1, "clip_low": "x"}},
            "method.surrogate.clip_hihg: gspo has no such option; did you mean clip_high?\n"
            "method.surrogate.clip_low: found 'x', expected a valid number",
        ),
        ({"surrogate": {"kind": "gspo", "clip_low": -1}}, "method.surrogate.clip_low: found -1, expected a number of"),
        (
            {"surrogate": {"kind": "sapo", "tau_pos": 0.0}},
            "method.surrogate.tau_pos: found 0.0, expected a temperature",
        ),
        (
            {"surrogate": {"kind": "topr", "level": "tokens"}},
            "method.surrogate.level: found 'tokens', expected 'sequence' or 'token'",
        ),
        ({"surrogate": {"kind": "ppo", "clip_low": 0.1}}, "method.surrogate.clip_low: ppo has no such option"),
        (
            {"surrogate": "gspo", "clip_high": 0.3},
            "method.clip_high: found 0.3, expected 0.2, its default: clip_high is of the surrogate ppo alone; gspo has "
            "{kind = 'gspo', clip_low = 0.0003, clip_high = 0.0004}",
        ),
        ({"surrogate": "sapo", "dual_clip": 3.0}, "method.dual_clip: found 3.0, expected None, its default"),
    ],
)
def test_a_fault_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        methods.create({"name": "grpo"} | options)


def test_a_methods_own_default_range_is_no_fault() -> None:
    assert methods.create({"name": "dr_grpo", "surrogate": "gspo", "clip_high": 0.28})

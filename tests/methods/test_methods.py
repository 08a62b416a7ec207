"""Every method by name: creation and its messages, the papers' defaults, documentation, state, recipes."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.methods import METHODS
from tests.methods.cases import OPTIONS, Case, run

RECIPES = Path(__file__).parents[2] / "recipes"

# What the papers state: aggregation, clip range, and the method's own numbers.
PAPER: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "seq-mean-token-mean", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "dual_clip": None},
    "dr_grpo": {"aggregation": "seq-mean-token-sum-norm", "clip_low": 0.2, "clip_high": 0.28, "normalise": False},
    "clip_higher": {"aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.28, "overlong_buffer": 4096},
    "entropy_bonus": {"coef": 0.001},
    "high_entropy_reward": {"coef": 0.001, "rho": 0.2},
    "ppo": {
        "aggregation": "token-mean",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "gamma": 1.0,
        "lam": 1.0,
        "value_clip": 0.5,
        "critic_only_steps": 10,
        "beta": 0.0,
    },
    "clip_cov": {"aggregation": "token-mean", "clip_low": 1, "clip_high": 1, "r": 2e-4, "w_low": 1, "w_high": 5},
    "kl_cov": {"aggregation": "token-mean", "k": 2e-3, "kl_coef": 1.0},
    "forking_tokens": {"aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.28, "rho": 0.2},
    "nsr": {"aggregation": "token-mean", "clip_high": 0.2, "positive": 0.0, "negative": 1.0},
    "psr": {"aggregation": "token-mean", "clip_high": 0.2, "positive": 1.0, "negative": 0.0},
    "w_reinforce": {"aggregation": "token-mean", "clip_high": 0.2, "positive": 0.1, "negative": 1.0},
    "aec": {"aggregation": "token-mean", "target": 0.2, "delta": 1e-4, "c_max": 0.005, "c_0": 0.0},
    "dmmpt": {"aggregation": "token-mean", "tau": 0.99, "sigma": 0.2, "switch": "response"},
    "siren": {
        "aggregation": "seq-mean-token-sum-norm",
        "normalise": False,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "p": 0.8,
        "tau": 0.8,
        "coef": 0.005,
        "nucleus": "inclusive",
    },
    "aer": {"clip_high": 0.2, "tau": 0.4, "rho": 0.2, "eta": 0.005, "alpha_0": 0.0},
    "entropy_advantage": {"aggregation": "token-mean", "clip_high": 0.28, "alpha": 0.4, "kappa": 2.0, "beta": 0.0},
    "entropy_advantage_ppo": {"clip_high": 0.28, "alpha": 0.1, "kappa": 2.0, "lam": 1.0, "critic_only_steps": 10},
    "entropic": {"clip_high": 0.2, "k_p": 1.0, "k_i": 0.01, "threshold": 0.95, "target": 0.1, "normaliser": "all"},
    "sent": {"clip_high": 0.2, "low_ratio": 0.8, "cov_ratio": 2e-4, "beta_low": 0.5, "beta_high": 2.0},
    "ce_gppo": {"aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.2, "beta_1": 0.5, "beta_2": 1.0},
    "erc": {"aggregation": "token-mean", "clip_high": 0.28, "ratio_low": 0.95, "ratio_high": 1.05, "preserve": False},
    "lp_reg": {
        "aggregation": "token-mean",
        "clip_low": 1.0,
        "clip_high": 9.0,
        "dual_clip": 10.0,
        "kappa": 0.02,
        "rho": 0.01,
        "kl_coef": 1.0,
    },
    "steer": {"aggregation": "token-mean", "clip_high": 0.28, "lambda_min": 0.7, "variant": "paper"},
    "adapo": {"aggregation": "token-mean", "clip_low": 0.2, "clip_high": 0.28, "target": None},
    "entrocraft": {
        "clip_high": 0.2,
        "h_low": 0.6,
        "h_high": 0.7,
        "h_low_end": 0.4,
        "h_high_end": 0.5,
        "variant": "paper",
    },
    "mai_clip": {
        "aggregation": "token-mean",
        "clip_low": 0.6,
        "clip_high": 1.5,
        "dual_clip": 50.0,
        "target": 0.3,
        "delta": 0.25,
        "k_max": 2.5,
        "k_0": 0.0,
        "measure": "importance",
    },
    "qae": {"aggregation": "token-mean", "clip_high": 0.28, "k": 0.4, "interpolate": False},
    "repo": {"form": "rescaled", "zeta_min": 1e-4, "zeta_max": 0.05, "target": None, "adapt": True},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_are_the_papers_over_the_whole_mini_batch(name: str) -> None:
    assert name in PAPER, f"{name} is new: add the paper's values of its options to PAPER, above in this file"
    method = methods.create({"name": name})
    assert {option: getattr(method, option) for option in PAPER[name]} == PAPER[name]
    assert getattr(method, "scope", "mini_batch") == "mini_batch"


@pytest.mark.parametrize("name", METHODS)
def test_a_page_names_its_paper_and_is_a_page(name: str) -> None:
    module = inspect.getmodule(METHODS[name])
    assert module is not None and module.__doc__ is not None
    assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__), f"{name}: cite its paper in {module.__file__}'s docstring"
    assert len(inspect.getsource(module).splitlines()) <= 150


def test_every_method_is_tested_and_has_a_recipe_of_its_own() -> None:
    new = set(METHODS) - {options["name"] for options in OPTIONS.values()}
    assert not new, (
        f"{sorted(new)}: add options to OPTIONS in tests/methods/cases.py at which each of its branches acts"
    )
    assert {options["name"] for options in OPTIONS.values()} <= set(METHODS), (
        "OPTIONS has a method that METHODS has not"
    )
    for name in METHODS:
        path = RECIPES / name / f"{name}-tiny-cpu.toml"
        assert path.is_file(), f"{name} has no {path}: write it, as short as recipes/grpo/grpo-tiny-cpu.toml"
        recipe = tomllib.loads(path.read_text())
        assert recipe["name"] == f"{name}-tiny-cpu" and recipe["parent"] == "../tiny/tiny-cpu.toml"
        assert recipe["method"]["name"] == name
        methods.create(recipe["method"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method.name: unknown method None; expected one of adapo, aec,"),
        ({"name": "sirn"}, "method.name: unknown method 'sirn'; did you mean siren?"),
        ({"name": "siren", "coeff": 1.0}, "method.coeff: siren has no such option; did you mean coef?"),
        ({"name": "siren", "h_anchor": 1.0}, "method.h_anchor: siren has no such option"),
        ({"name": "siren", "tau": "high"}, "method.tau: found 'high', expected a valid number"),
        ({"name": "siren", "anchor": 1}, "method.anchor: found 1, expected a valid boolean"),
        ({"name": "siren", "coef": True}, "method.coef: found True, expected a valid number"),
        ({"name": "siren", "nucleus": "top"}, "method.nucleus: found 'top', expected 'inclusive' or 'exclusive'"),
        (
            {"name": "grpo", "dual_clip": "no"},
            "method.dual_clip: found 'no', expected a valid number",
        ),
        ({"name": "siren", "p": 0.0}, "method.p: found 0.0, expected a mass above 0 and at most 1"),
        ({"name": "siren", "p": 1.1}, "method.p: found 1.1"),
        ({"name": "siren", "tau": 1.0}, "method.tau: found 1.0, expected a quantile from 0 to below 1"),
        ({"name": "siren", "coef": -1}, "method.coef: found -1"),
        ({"name": "grpo", "clip_low": -0.1}, "method.clip_low: found -0.1, expected a number of at least 0"),
        ({"name": "grpo", "beta": float("nan")}, "method.beta: found nan"),
        ({"name": "grpo", "dual_clip": 1.0}, "method.dual_clip: found 1.0, expected a number above 1, or 0 for none"),
        (
            {"name": "clip_higher", "overlong_max": 99},
            "method.overlong_max: found 99, expected at least overlong_buffer",
        ),
        ({"name": "clip_cov", "w_low": 5}, "method.w_high: found 5.0, expected more than w_low = 5"),
        ({"name": "clip_cov", "r": 0.0}, "method.r: found 0.0"),
        ({"name": "kl_cov", "k": 2}, "method.k: found 2"),
        ({"name": "forking_tokens", "rho": 0.0}, "method.rho: found 0.0"),
        ({"name": "forking_tokens", "quantile": "token"}, "method.quantile: found 'token'"),
        ({"name": "ppo", "lam": 1.1}, "method.lam: found 1.1, expected a number from 0 to 1"),
        ({"name": "ppo", "gamma": 0.0}, "method.gamma: found 0.0, expected a discount above 0 and at most 1"),
        ({"name": "ppo", "value_clip": 0.0}, "method.value_clip: found 0.0, expected a number above 0"),
        ({"name": "ppo", "critic_only_steps": -1}, "method.critic_only_steps: found -1"),
        ({"name": "nsr", "negative": 0.0}, "method.negative: found 0.0"),
        ({"name": "aec", "target": 0.0}, "method.target: found 0.0, expected an entropy above 0, in nats"),
        ({"name": "aec", "c_0": 0.1}, "method.c_0: found 0.1, expected a number from 0 to c_max = 0.005"),
        ({"name": "dmmpt", "sigma": 0.0}, "method.sigma: found 0.0"),
        ({"name": "aer", "tau": 0.0}, "method.tau: found 0.0, expected a ratio above 0"),
        ({"name": "aer", "tau": 0.0}, "method.tau: found 0.0"),
        ({"name": "aer", "rho": -0.1}, "method.rho: found -0.1"),
        ({"name": "entropy_advantage", "kappa": 0.5}, "method.kappa: found 0.5"),
        ({"name": "entropic", "target": -0.1}, "method.target: found -0.1"),
        ({"name": "entropic", "threshold": 1.0}, "method.threshold: found 1.0"),
        ({"name": "entropic", "k_i": -1.0}, "method.k_i: found -1.0, expected a gain of at least 0"),
        ({"name": "sent", "low_ratio": 80}, "method.low_ratio: found 80, expected a share"),
        ({"name": "ce_gppo", "beta_1": -0.5}, "method.beta_1: found -0.5, expected a factor of at least 0"),
        ({"name": "erc", "ratio_low": 1.0}, "method.ratio_low: found 1.0, expected a ratio from 0 to below 1"),
        ({"name": "erc", "ratio_high": 1}, "method.ratio_high: found 1, expected a ratio above 1"),
        ({"name": "lp_reg", "kappa": 1.0}, "method.kappa: found 1.0, expected a share of the likeliest token's"),
        ({"name": "lp_reg", "rho": 0.0}, "method.rho: found 0.0"),
        ({"name": "steer", "lambda_min": 0.0}, "method.lambda_min: found 0.0, expected a weight above 0"),
        ({"name": "steer", "floor": 0}, "method.floor: found 0"),
        ({"name": "adapo", "clip_high": 0.5}, "method.clip_high: found 0.5, expected from clip_high_min = 0.2 to"),
        ({"name": "adapo", "target": 0.0}, "method.target: found 0.0, expected an entropy above 0, in nats"),
        ({"name": "adapo", "band": 1.0}, "method.band: found 1.0, expected a share of the target"),
        ({"name": "entrocraft", "h_low": 0.8}, "method.h_high: found 0.7, expected at least h_low = 0.8"),
        ({"name": "entrocraft", "h_high_end": 0.3}, "method.h_high_end: found 0.3, expected at least h_low_end = 0.4"),
        ({"name": "entrocraft", "anneal_steps": 0}, "method.anneal_steps: found 0, expected a number of steps"),
        ({"name": "mai_clip", "clip_low": 1.0}, "method.clip_low: found 1.0, expected a number from 0 to below 1"),
        ({"name": "mai_clip", "k_0": 3.0}, "method.k_0: found 3.0, expected a number from 0 to k_max = 2.5"),
        ({"name": "mai_clip", "measure": "logprob"}, "method.measure: found 'logprob'"),
        ({"name": "qae", "k": 1.0}, "method.k: found 1.0, expected a quantile above 0 and below 1"),
        ({"name": "repo", "zeta_0": 0.1}, "method.zeta_0: found 0.1, expected at most zeta_max = 0.05"),
        ({"name": "repo", "zeta_max": 1e-5}, "method.zeta_max: found 1e-05, expected at least zeta_min = 0.0001"),
    ],
)
def test_a_fault_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        methods.create(options)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_method_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    cases = [Case(seed) for seed in (3, 4, 5)]
    straight = methods.create(OPTIONS[name])
    for case in cases[:2]:
        straight = run(case, straight).methods[0]
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = methods.create(OPTIONS[name])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    one, other = run(cases[2], straight), run(cases[2], resumed)
    assert torch.equal(one.gradient, other.gradient) and one.loss == other.loss
    assert one.methods[0].state_dict() == other.methods[0].state_dict()


STATEFUL = ["adapo", "aec", "aer", "clip_cov", "entrocraft", "entropic", "mai_clip", "repo", "siren"]
COUNTING = ["entropy_advantage_ppo", "ppo"]  # only the steps: test_ppo.py


def test_the_methods_with_state_are_known() -> None:
    stateful = {name for name in METHODS if methods.create({"name": name}).state_dict()}
    new = stateful - {*STATEFUL, *COUNTING}
    assert not new, (
        f"{sorted(new)} keep state: add them to STATEFUL, above, and to MOVING in tests/train/test_resume.py"
    )
    assert stateful == {*STATEFUL, *COUNTING}, "remove from STATEFUL or COUNTING what keeps no state"


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_matters(name: str) -> None:
    moved = methods.create(OPTIONS[name])
    for seed in (3, 4):
        moved = run(Case(seed), moved).methods[0]
    fresh, resumed = run(Case(5), OPTIONS[name]), run(Case(5), moved)
    assert not torch.equal(fresh.gradient, resumed.gradient)


def test_the_state_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("GRPO keeps no state but the checkpoint holds ['h_anchor']")):
        methods.create({"name": "grpo"}).load_state_dict({"h_anchor": 0.5})
    with pytest.raises(ValueError, match=re.escape("SIREN keeps ['h_anchor'] but the checkpoint holds none")):
        methods.create({"name": "siren"}).load_state_dict({})


@pytest.mark.parametrize("name", METHODS)
def test_a_group_relative_method_learns_nothing_from_single_responses(name: str) -> None:
    method = methods.create({"name": name})
    if not method.needs.value:  # a critic gives advantages of another kind
        advantage = method.advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 1, 2]))
        assert bool((advantage == 0).all()) == method.group_relative
    else:
        assert not method.group_relative

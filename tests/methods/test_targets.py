"""Targets that move: values by hand, the controllers that follow them, what a checkpoint keeps, and faults."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.config.describe import to_toml
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Method, Needs, OneRank
from megatron_ext.methods.siren import SIREN
from megatron_ext.methods.targets import Targeted, read
from megatron_ext.train.method_factory import create_method
from tests.methods.cases import OPTIONS, TWO_RANKS, Case, Result, batch, entropy, run, statistics

ROOT = Path(__file__).parents[2]
CONTROLLERS = {  # options at which each acts on the case, and the metric of its target
    "aec": ({"name": "aec", "c_0": 0.3, "c_max": 0.5, "delta": 0.05}, "entropy/target"),
    "aer": ({"name": "aer", "alpha_0": 0.4, "rho": 0.6}, "aer/target"),
    "entropic": ({"name": "entropic", "threshold": 0.6}, "entropy/target"),
    "siren": ({"name": "siren", "coef": 0.7, "tau": 0.6}, "siren/anchor"),
    "mai_clip": ({"name": "mai_clip", "clip_low": 0.1, "clip_high": 1 / 0.9 - 1, "delta": 0.1}, "entropy/target"),
    "mai_clip, entropy": (
        {"name": "mai_clip", "clip_low": 0.1, "clip_high": 1 / 0.9 - 1, "delta": 0.1, "measure": "entropy"},
        "entropy/target",
    ),
    "repo": ({"name": "repo", "zeta_0": 0.3, "zeta_max": 4.0}, "repo/target"),
    "adapo": ({"name": "adapo", "clip_high": 0.3, "delta": 0.05, "clip_high_max": 0.8}, "adapo/target"),
}


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ({"kind": "constant", "start": 0.3}, [0.3] * 7),
        ({"kind": "linear", "start": 0.6, "end": 0.2, "steps": 4}, [0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2]),
        ({"kind": "linear", "start": 0.2, "end": 0.4, "steps": 2}, [0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]),
        # (1 + cos(pi x)) / 2 is 1, .853553, .5, .146447, 0
        ({"kind": "cosine", "start": 0.6, "end": 0.2, "steps": 4}, [0.6, 0.541421, 0.4, 0.258579, 0.2, 0.2, 0.2]),
        ({"kind": "step", "start": 0.6, "end": 0.2, "steps": 3}, [0.6, 0.6, 0.6, 0.2, 0.2, 0.2, 0.2]),
        ({"kind": "step", "start": 0.6, "end": 0.2, "steps": 4, "stages": 2}, [0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.2]),
        ({"kind": "step", "start": 1.0, "end": 0.4, "steps": 5, "stages": 3}, [1.0, 1.0, 0.8, 0.8, 0.6, 0.4, 0.4]),
    ],
)
def test_values_by_hand(table: dict[str, Any], values: list[float]) -> None:
    assert [read(table).value(n) for n in range(7)] == pytest.approx(values, abs=1e-6)


def test_the_last_value_is_the_end_itself() -> None:
    for kind in ("linear", "cosine", "step"):
        assert read({"kind": kind, "start": 0.7, "end": 0.1, "steps": 7}).value(7) == 0.1


def begin(method: Method, scale: float) -> dict[str, float]:
    """A step whose entropy is that of the case's old policy with logits times ``scale``."""
    case = Case()
    case.old = case.old * scale
    needs = Needs(entropy=True, nucleus_p=0.8)
    return method.on_step_start(batch(case, method), statistics(case, case.old, needs).detach(), OneRank())


def first_measured(name: str) -> float:
    """What the method compares with its target, in the step of scale 1."""
    if name == "siren":
        return begin(methods.create(CONTROLLERS[name][0]), 1.0)["siren/hbar"]
    if name == "mai_clip":  # the estimate of its equation 7, at a ratio of 1
        return -float(Case().logp(Case().old)[Case().tokens].mean())
    return float(entropy(Case().old)[Case().tokens].mean())


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controllers_target_is_that_of_the_step(name: str) -> None:
    options, metric = CONTROLLERS[name]
    table = {"kind": "linear", "start": 0.9, "end": 0.5, "steps": 2}
    method = methods.create(options | {"target": table})
    assert [begin(method, 1)[metric] for _ in range(4)] == pytest.approx([0.9, 0.7, 0.5, 0.5])
    assert method.controller is not None and method.controller.target == metric


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_relative_target_is_a_share_of_the_first_entropy(name: str) -> None:
    options, metric = CONTROLLERS[name]
    table = {"kind": "step", "start": 1.0, "end": 0.5, "steps": 2, "relative": True}
    method = methods.create(options | {"target": table})
    assert method.needs.old
    h_0 = first_measured(name)
    assert h_0 > 0.1
    found = [begin(method, scale)[metric] for scale in (1, 9, 0.5, 3)]  # later entropies do not matter
    assert found == pytest.approx([h_0, h_0, h_0 / 2, h_0 / 2])


def test_a_number_of_nats_has_no_metric_and_no_state() -> None:
    for name in ("aec", "entropic"):
        options, metric = CONTROLLERS[name]
        number, table = (methods.create(options | {"target": t}) for t in (0.7, {"kind": "constant", "start": 0.7}))
        assert metric not in begin(number, 1) and metric not in begin(table, 1)
        assert number.state_dict().keys() == table.state_dict().keys() == methods.create(options).state_dict().keys()
        assert number.controller == table.controller and number.controller is not None
        assert number.controller.target == 0.7


def test_the_coefficient_of_aec_follows_a_target_that_falls() -> None:
    """Scale 1 has an entropy of about 1.1: below a target of 1.5, above one of .5."""
    h = float(entropy(Case().old)[Case().tokens].mean())
    assert 0.6 < h < 1.4
    table = {"kind": "step", "start": 1.5, "end": 0.5, "steps": 3}
    method = methods.create({"name": "aec", "target": table, "delta": 0.1, "c_max": 1.0})
    found = [begin(method, 1)["aec/next"] for _ in range(6)]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.1, 0.0])


def test_alpha_of_aer_follows_a_target_in_nats() -> None:
    table = {"kind": "step", "start": 1.5, "end": 0.5, "steps": 2}
    method = methods.create({"name": "aer", "target": table, "eta": 0.1})
    found = [begin(method, 1)["aer/alpha"] for _ in range(5)]  # in force from the next step on
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.1, 0.0])


def test_the_square_of_siren_is_around_the_target() -> None:
    method = methods.create(CONTROLLERS["siren"][0] | {"target": {"kind": "constant", "start": 0.4}})
    hbar = begin(method, 1)["siren/hbar"]
    assert isinstance(method, SIREN)
    assert method.square(hbar) == pytest.approx((2 * 0.7 * (hbar - 0.4), 0.7 * (hbar - 0.4) ** 2))


def step(result: Result | None, options: dict[str, Any], seed: int, **how: Any) -> Result:
    return run(Case(seed), options if result is None else result.methods[0], **how)


def test_alpha_of_entropic_follows_the_scheduled_target() -> None:
    table = {"kind": "linear", "start": 0.8, "end": 1.2, "steps": 2}
    options = {"name": "entropic", "target": table, "k_p": 0.5, "k_i": 0.1}
    result, integral = None, 0.0
    for seed, target in ((3, 0.8), (4, 1.0), (5, 1.2)):
        result = step(result, options, seed)
        case = Case(seed)
        error = float(entropy(case.logits)[case.tokens].mean()) - target
        integral += error
        assert result.observed["entropy/target"] == pytest.approx(target)
        assert result.methods[0].state_dict()["alpha"] == pytest.approx(0.5 * error + 0.1 * integral)


@pytest.mark.parametrize("name", CONTROLLERS)
@pytest.mark.parametrize("relative", [False, True])
def test_a_resumed_schedule_goes_on_bit_for_bit(name: str, relative: bool, tmp_path: Path) -> None:
    table = {"kind": "cosine", "start": 0.9, "end": 0.4, "steps": 5, "relative": relative}
    options = CONTROLLERS[name][0] | {"target": table}
    two = step(step(None, options, 3), options, 4)
    torch.save(two.methods[0].state_dict(), tmp_path / "state.pt")
    resumed = methods.create(options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    straight, other = step(two, options, 5), run(Case(5), resumed)
    assert straight.observed == other.observed and torch.equal(straight.gradient, other.gradient)
    fresh = run(Case(5), options)
    assert fresh.observed[CONTROLLERS[name][1]] != straight.observed[CONTROLLERS[name][1]]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_no_split_changes_a_relative_target(name: str) -> None:
    table = {"kind": "linear", "start": 0.9, "end": 0.4, "steps": 5, "relative": True}
    options = CONTROLLERS[name][0] | {"target": table}
    whole, split = step(None, options, 3), step(None, options, 3, shares=TWO_RANKS, micro_batch=2)
    assert split.observed == pytest.approx(whole.observed, rel=1e-9)
    assert float((whole.gradient - split.gradient).norm() / whole.gradient.norm()) < 1e-9
    for member in split.methods:
        assert member.state_dict() == pytest.approx(whole.methods[0].state_dict(), rel=1e-12)


LINEAR = {"kind": "linear", "start": 0.6, "end": 0.2, "steps": 10}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "high"}, "method.target: found 'high', expected a valid number or a table"),
        ({"target": {"start": 0.3}}, "method.target.kind: missing; a schedule has no default for it"),
        ({"target": LINEAR | {"kind": "exp"}}, "method.target.kind: found 'exp', expected 'constant', 'linear'"),
        ({"target": LINEAR | {"stesp": 3}}, "method.target.stesp: a schedule has no such option; did you mean steps?"),
        ({"target": LINEAR | {"start": 0}}, "method.target.start: found 0, expected an entropy above 0, in nats"),
        (
            {"target": LINEAR | {"end": -1.0, "relative": True}},
            "target.end: found -1.0, expected a share of H_0 above 0",
        ),
        ({"target": LINEAR | {"steps": 0}}, "method.target.steps: found 0, expected a number of training steps of at"),
        ({"target": LINEAR | {"steps": 2.5}}, "method.target.steps: found 2.5, expected a valid integer"),
        (
            {"target": {"kind": "cosine", "start": 0.3, "steps": 4}},
            "method.target.end: found None, expected an entropy",
        ),
        ({"target": {"kind": "constant", "start": 0.3, "end": 0.1}}, "method.target.end: found 0.1, expected none"),
        (
            {"target": LINEAR | {"stages": 2}},
            "method.target.stages: found 2, expected a number of at least 1, and only",
        ),
        ({"target": LINEAR | {"relative": 1}}, "method.target.relative: found 1, expected a valid boolean"),
        ({"name": "aer", "tau": 0.5, "target": 0.3}, "method.tau: found 0.5, expected 0.4, its default, since target"),
        ({"name": "siren", "anchor": False, "target": 0.3}, "method.target: found 0.3, expected none: without anchor"),
        ({"name": "siren", "target": 0.0}, "method.target: found 0.0, expected an entropy above 0, in nats"),
    ],
)
def test_a_fault_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        methods.create({"name": "aec"} | options)


def test_a_recipe_states_a_schedule_and_prints_it_back(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'parent = "{ROOT}/recipes/aec/aec-tiny-cpu.toml"\n[method.target]\nkind = "cosine"\nstart = 0.6\n'
    )
    config = read_config(recipe, ["method.target.end=0.2", "method.target.steps=3"])
    table = {"kind": "cosine", "start": 0.6, "end": 0.2, "steps": 3}
    assert config.method["target"] == table
    method = create_method(config)
    assert isinstance(method, Targeted) and method.schedule == read(table)
    (tmp_path / "printed.toml").write_text(to_toml(config.model_dump()))
    assert read_config(tmp_path / "printed.toml").method == config.method
    with pytest.raises(
        ConfigError, match=re.escape("method.target.steps: found 0, expected a number of training steps")
    ):
        create_method(read_config(recipe, ["method.target.end=0.2", "method.target.steps=0"]))


def test_numbers_of_a_schedule_are_finite() -> None:
    with pytest.raises(ValueError, match="options are finite numbers"):
        Config.model_validate({"method": {"name": "aec", "target": LINEAR | {"start": math.inf}}})


def test_every_method_with_a_target_is_tested_here() -> None:
    found = {options["name"] for options in OPTIONS.values()}
    assert {name for name in found if isinstance(methods.create({"name": name}), Targeted)} == {
        options["name"] for options, _ in CONTROLLERS.values()
    }

"""Alarms begin once, end, survive a resume, and stop a run that asks for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_ext.config.schema import AlarmsConfig
from megatron_ext.metrics.alarms import NAMES, Alarms
from tests.train import whole_run


def step(entropy: float = 1.0, zero: float = 0.0, **others: float) -> dict[str, float]:
    return {"entropy/full": entropy, "advantage/zero": zero, **others}


def begun(alarms: Alarms, *steps: dict[str, float]) -> list[list[str]]:
    """The names of the alarms that begin with each step."""
    return [[line.split(":")[0].removeprefix("alarm ") for line in alarms.check(metrics)[1]] for metrics in steps]


def test_entropy_is_compared_with_the_first_steps() -> None:
    alarms = Alarms(AlarmsConfig(entropy_floor=0.5, entropy_ceiling=2.0))
    steps = [step(e) for e in (0.4, 0.21, 0.2, 0.19, 0.1, 0.3, 0.79, 0.81, 0.9, 0.19)]
    low, high = ["entropy_low"], ["entropy_high"]
    assert begun(alarms, *steps) == [[], [], [], low, [], [], [], high, [], low]
    values, _ = alarms.check(step(0.19))
    assert values == {f"alarm/{name}": float(name == "entropy_low") for name in NAMES} | {"alarm/begun": 3.0}


def test_a_line_says_what_was_found_what_was_expected_and_what_to_do() -> None:
    alarms = Alarms(AlarmsConfig(entropy_floor=0.5))
    alarms.check(step(0.4))
    [line] = alarms.check(step(0.1))[1]
    assert "entropy 0.1 nats, expected at least alarms.entropy_floor = 0.5 x the first step's 0.4" in line
    assert "lower optimizer.lr" in line


def test_numbers_that_are_none_and_steps_without_a_signal() -> None:
    alarms = Alarms(AlarmsConfig(zero_advantage_share=0.5))
    nan, inf = {"grad/norm": math.nan}, {"loss/total": -math.inf, "critic/explained_variance": math.nan}
    assert begun(alarms, step(math.nan), step(**nan), step(**inf), step(**inf, zero=0.6), step(zero=0.5)) == [
        ["not_finite"],  # an entropy that is not a number is nothing to compare with
        [],
        [],
        ["zero_advantage"],
        [],
    ]
    assert alarms.first_entropy == 1.0
    assert "loss/total not finite" in alarms.check(step(**inf))[1][0]
    alarms = Alarms(AlarmsConfig())
    assert begun(alarms, step(**{"critic/grad_norm": math.nan})) == [["not_finite"]]


def test_what_is_switched_off_is_silent() -> None:
    alarms = Alarms(AlarmsConfig(entropy_floor=0.0, zero_advantage_share=1.0))
    assert begun(alarms, step(1.0), step(0.0, zero=1.0)) == [[], []]


def test_a_resumed_run_goes_on_where_it_was() -> None:
    first = Alarms(AlarmsConfig())
    assert begun(first, step(1.0), step(0.1)) == [[], ["entropy_low"]]
    resumed = Alarms(AlarmsConfig())
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun(resumed, step(0.1), step(0.5), step(0.1)) == [[], [], ["entropy_low"]]
    assert resumed.state_dict() == {"first_entropy": 1.0, "lasting": ["entropy_low"], "num_begun": 2}


def test_an_alarm_that_stops_leaves_a_checkpoint_and_a_way_to_go_on(tmp_path: Path) -> None:
    """With a floor of .999 of the first entropy some early step falls below it."""
    grpo = "grpo/grpo-tiny-cpu.toml"
    limits = ("train.steps=9", "checkpoint.every=0", "optimizer.lr=1e-3", "alarms.entropy_floor=0.999")
    limits += ("alarms.zero_advantage_share=1", "alarms.entropy_ceiling=99")
    with pytest.raises(AssertionError, match="AlarmError: stopped by alarms.stop after: entropy_low") as caught:
        whole_run.train(tmp_path, grpo, *limits, "alarms.stop=true")
    assert "set alarms.stop = false to go on" in str(caught.value)
    done = whole_run.metrics(tmp_path)
    assert 1 < len(done) < 9 and done[0]["alarm/begun"] == 0.0
    assert (done[-1]["alarm/entropy_low"], done[-1]["alarm/begun"]) == (1.0, 1.0)
    assert whole_run.contents(tmp_path, len(done))
    with pytest.raises(AssertionError, match="AlarmError"):
        whole_run.train(tmp_path, grpo, *limits, "alarms.stop=true")  # and does not creep on
    assert whole_run.metrics(tmp_path) == done
    assert whole_run.train(tmp_path, grpo, *limits) == 0
    assert len(whole_run.metrics(tmp_path)) == 9

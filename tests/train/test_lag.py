"""Under ``rollout.max_lag`` a step trains on what the weights of exactly so many steps before have sampled."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext import cpu_compat, heartbeat
from megatron_ext.config.loading import load_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.kept_tokens import KeptTokens
from megatron_ext.metrics.spans import BESIDE
from megatron_ext.metrics.writer import read_steps
from megatron_ext.model import groups, parallel
from megatron_ext.train import loop
from megatron_ext.train.ahead import Beside
from megatron_ext.train.sampled_batch import SampledBatch
from megatron_ext.train.step import Learner
from megatron_ext.types import Episode, Problem, Reward, Sample
from tests import gloo
from tests.train import whole_run

RECIPE = "siren/siren-tiny-cpu.toml"  # its anchor is state
MOVING = ("optimizer.lr=2e-3",)  # after each step the weights sample otherwise


def of_responses(step: dict[str, Any]) -> list[float]:
    """What depends on the responses alone, not on what trains on them."""
    return [step[name] for name in ("response/length", "response/truncated", "reward/mean", "data/epoch")]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A run whose weights stay the first ones, to the last bit: AdamW's steps are far below fp32's."""
    folder = tmp_path_factory.mktemp("frozen")
    assert whole_run.train(folder, RECIPE, "optimizer.lr=1e-30", "train.steps=6", "checkpoint.every=0") == 0
    return whole_run.steps(folder)


def test_the_first_weights_sample_all_batches_up_to_the_lag(tmp_path: Path, frozen: list[dict[str, Any]]) -> None:
    options = (*MOVING, "train.steps=6", "checkpoint.every=0")
    found = {}
    for lag in (0, 1, 4):
        assert whole_run.train(tmp_path / str(lag), RECIPE, *options, f"rollout.max_lag={lag}") == 0
        found[lag] = whole_run.steps(tmp_path / str(lag))
    expected = [of_responses(step) for step in frozen]
    same = {lag: [of_responses(step) for step in steps] for lag, steps in found.items()}
    for lag, steps in same.items():
        assert steps[: lag + 1] == expected[: lag + 1] and steps[lag + 1] != expected[lag + 1]
    assert "rollout/lag" not in found[0][0]
    assert [step["rollout/lag"] for step in found[1]] == [0, 1, 1, 1, 1, 1]
    assert [step["rollout/lag"] for step in found[4]] == [0, 1, 2, 3, 4, 4]
    for lag, steps in found.items():  # the trainer's log-probs are those of newer weights than the engine's
        assert all((step["mismatch/mean"] < 1e-4) == (lag == 0 or number == 0) for number, step in enumerate(steps))
        assert all("time/rollout_background_s" not in step for step in steps)


@pytest.mark.parametrize(
    ("lag", "world", "options"),
    [
        (1, 1, ()),
        (4, 2, ("parallel.tensor=2", "rollout.top_k=20")),  # with what the sampler kept
        (4, 2, ("rollout.dynamic_sampling=true", "rollout.oversample=1.5", "rollout.max_generations=2")),
        (2, 2, ("train.mini_batch_prompts=4", "importance.mode=truncate")),
    ],
    ids=str,
)
def test_a_run_that_is_killed_goes_on_with_what_was_sampled_ahead(
    lag: int, world: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    options = (*MOVING, f"rollout.max_lag={lag}", "train.steps=6", "checkpoint.keep=9", *options)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert whole_run.train(whole, RECIPE, *options, world=world) == 0
    whole_run.train_and_die(killed, RECIPE, *options, after=3, world=world)
    assert whole_run.train(killed, RECIPE, *options, world=world) == 0
    assert whole_run.metrics(killed) == whole_run.metrics(whole)
    for step in (3, 4, 6):  # 4: what was loaded is saved again, beside what was sampled since
        assert whole_run.contents(killed, step) == whole_run.contents(whole, step)
    saved = torch.load(whole / "run/checkpoints/step_000003/state.pt", weights_only=True)["state"]["ahead"]
    expected = list(range(3, min(3 + lag, 6)))
    assert [json.loads(batch["fields"])["step"] for batch in saved] == expected
    assert [json.loads(batch["fields"])["version"] for batch in saved] == [max(0, step - lag) for step in expected]


def test_what_is_sampled_ahead_is_dealt_to_another_number_of_ranks(tmp_path: Path) -> None:
    options = (*MOVING, "rollout.max_lag=2", "train.steps=4")
    assert whole_run.train(tmp_path / "one", RECIPE, *options) == 0
    whole_run.train_and_die(tmp_path / "two", RECIPE, *options, after=2, world=2)
    assert whole_run.train(tmp_path / "two", RECIPE, *options) == 0
    one, two = (whole_run.steps(tmp_path / name) for name in ("one", "two"))
    assert [of_responses(step) for step in two[:4]] == [of_responses(step) for step in one[:4]]
    assert [step["rollout/lag"] for step in two] == [0, 1, 2, 2]


def test_more_steps_than_were_asked_for_are_sampled_by_the_weights_that_are_there(tmp_path: Path) -> None:
    options = (*MOVING, "rollout.max_lag=2")
    assert whole_run.train(tmp_path, RECIPE, *options, "train.steps=3") == 0
    assert whole_run.train(tmp_path, RECIPE, *options, "train.steps=6") == 0
    assert [step["rollout/lag"] for step in whole_run.steps(tmp_path)] == [0, 1, 2, 0, 1, 2]


def test_another_lag_would_be_another_run(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path, RECIPE, "train.steps=1") == 0
    with pytest.raises(AssertionError, match="rollout.max_lag: checkpoint 0, now 1"):
        whole_run.train(tmp_path, RECIPE, "train.steps=2", "rollout.max_lag=1")


def engine(name: str, seconds: float = 0.0) -> tuple[str, str]:
    return f'rollout.engine="tests.train.sleeping:{name}"', f"rollout.options={{seconds={seconds}}}"


def killed_in_the_third_update(rank: int, world: int, folder: Path, options: tuple[str, ...]) -> int:
    kind: Any = Learner
    real, steps = Learner.step, []

    def step(*args: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    kind.step = step
    return whole_run._rank(rank, world, folder, RECIPE, options, None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_beside_training_the_batches_are_those_that_are_sampled_in_turn(dynamic: bool, tmp_path: Path) -> None:
    """Also where the run was killed while one was in the making."""
    options = (*MOVING, "rollout.max_lag=1", "train.steps=4", f"rollout.dynamic_sampling={str(dynamic).lower()}")
    for name in ("IN_TURN", "BESIDE"):
        assert whole_run.train(tmp_path / name, RECIPE, *options, *engine(name, 0.1), world=2) == 0
    with pytest.raises(AssertionError, match="died without a report|closed by peer"):  # of the rank that dies first
        gloo.run(killed_in_the_third_update, 2, tmp_path / "killed", (*options, *engine("BESIDE", 0.1)))
    assert whole_run.train(tmp_path / "killed", RECIPE, *options, *engine("BESIDE", 0.1), world=2) == 0
    steps = whole_run.steps(tmp_path / "BESIDE")
    assert ["time/rollout_background_s" in step for step in steps] == [True, True, True, False]
    for name in ("BESIDE", "killed"):
        assert whole_run.metrics(tmp_path / name) == whole_run.metrics(tmp_path / "IN_TURN")
        assert whole_run.contents(tmp_path / name, 4) == whole_run.contents(tmp_path / "IN_TURN", 4)


def failing(rank: int, world: int, folder: Path, options: tuple[str, ...]) -> int:
    """A run with the real reward pool, whose first update raises."""
    gc.freeze()
    os.environ["HF_HUB_OFFLINE"] = "1"

    def step(*_: Any, **__: Any) -> Any:
        (folder / "raised").touch()
        raise RuntimeError("the update fails")

    kind: Any = Learner
    kind.step = step
    own = (f'data.train="{whole_run.data()}"', f'log.dir="{folder}"', 'data.curriculum=""', "reward.workers=1")
    return loop.run(load_config(whole_run.RECIPES / RECIPE, [*whole_run.SMALL, *own, *options]))


def test_an_error_of_a_step_does_not_wait_for_what_is_generated_beside_it(tmp_path: Path) -> None:
    """The engine sleeps over it for ten seconds more, with the reward pool at its service."""
    whole_run.data()
    with pytest.raises(AssertionError, match="the update fails"):
        gloo.run(failing, 1, tmp_path, (*MOVING, "rollout.max_lag=1", *engine("BESIDE", 10.0)), timeout=120)
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 8


def test_a_batch_that_nobody_waits_for_keeps_no_process_alive() -> None:
    before, over = set(threading.enumerate()), threading.Event()
    call: Any = over.wait
    batch = Beside(call)
    assert [each.daemon for each in set(threading.enumerate()) - before] == [True]
    over.set()
    assert batch.result() is True


def test_a_rank_that_waits_for_others_in_its_second_thread_is_not_blamed() -> None:
    """It has generated its own part of a batch, and another rank has not."""
    others = threading.Lock()
    others.acquire()
    code = compile("others.acquire()", os.path.join("torch", "distributed", "as_if.py"), "exec")
    call: Any = partial(exec, code, {"others": others})
    batch = Beside(call)
    main = threading.Thread(target=batch.result)
    main.start()
    end = time.monotonic() + 60
    while not heartbeat._waits(main.ident or 0) and time.monotonic() < end:
        time.sleep(0.01)
    waits = heartbeat._waits(main.ident or 0)
    others.release()
    main.join()
    assert waits


def asleep(rank: int, world: int, folder: Path, options: tuple[str, ...], seconds: float) -> int:
    """A run whose training takes so many seconds more in each step."""
    kind: Any = Learner
    real = Learner.step

    def step(*args: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **named)

    kind.step = step
    return whole_run._rank(rank, world, folder, RECIPE, options, None)


def test_two_sleeping_engines_hide_at_least_four_fifths_of_the_rollout(tmp_path: Path) -> None:
    """A simulation: two ranks with an engine each, that sleep; training sleeps for longer. In the first step and in the
    last one there is a batch that cannot be hidden, and none to be sampled."""
    whole_run.data()
    options = ("rollout.max_lag=1", "train.steps=5", "checkpoint.every=0", *engine("BESIDE", 0.5))
    assert gloo.run(asleep, 2, tmp_path, options, 1.0) == [0, 0]
    steps = whole_run.steps(tmp_path)[1:-1]
    waited, taken = (sum(step[f"time/rollout{name}_s"] for step in steps) for name in ("", "_background"))
    assert taken > len(steps) * 0.5 and waited < 0.2 * taken
    assert all(step["speed/rollout_background_tokens_per_s"] > 0 for step in steps)
    assert all("speed/rollout_tokens_per_s" not in step for step in steps)  # a wait has no speed
    assert all("time/idle/rollout" not in step and "time/idle/update" in step for step in steps)
    line = list(read_steps(tmp_path / "run" / "timeline.jsonl"))[1]
    for rank in line["ranks"]:
        spans = {line["names"][name]: (begin, end) for name, begin, end in rank}
        begin, end = spans[BESIDE]
        assert end - begin > 0.5 and begin < spans["update"][0] < spans["update"][1] <= spans["rollout"][0]


def episode(index: int, sample: int) -> Episode:
    """Of every kind: with and without what the sampler kept, experts of 300, a reward that is none, odd text."""
    response = tuple(range(index, index + sample + 1))
    support = KeptTokens.of_lists([[token, 60] for token in response]) if sample % 2 else None
    routing = np.full((2 + len(response), 3, 2), 299, np.uint16) if index % 2 else None
    found = Sample((1, 2), response, (-0.1,) * len(response), "\ud800 ü", sample == 0, 7, support, routing)
    value = 1.0 if sample else float("nan")
    problem = Problem(f"p{index}", "prompt", "9", "countdown", (1, 2, 3), level="hard")
    return Episode(problem, index, found, Reward(value, "correct", None if index else "9"))


def saved_and_loaded(rank: int, world: int, states: list[dict[str, Any]] | None) -> tuple[dict, str]:
    """The state of a batch of four groups, or of the one given, and this rank's part of it when it is loaded."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    own = {i: [episode(i, s) for s in range(3)] for i in (0, 3, 4, 5) if i % groups.data().size() == rank}
    batch = SampledBatch(5, [0, 3, 4, 5], own, {"dynamic/filled": 1.0}, version=4)
    state = batch.state_dict() if states is None else states[0]
    loaded = SampledBatch.of_state(state) if state else None
    assert loaded is None or described(loaded) == described(batch)
    return state, "" if loaded is None else described(loaded)


def described(batch: SampledBatch) -> str:
    """Every value, arrays too; NaN is equal to itself there."""
    return repr((batch, [episode.sample.routing for group in batch.groups.values() for episode in group]))


def test_a_batch_is_the_same_after_a_checkpoint_on_any_number_of_ranks(tmp_path: Path) -> None:
    [(state, one)] = gloo.run(saved_and_loaded, 1, None)
    (other, _), (nothing, _) = gloo.run(saved_and_loaded, 2, None)
    assert nothing == {} and other["fields"] == state["fields"] and one
    for name in state.keys() - {"fields"}:
        assert torch.equal(other[name], state[name])
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    first, second = gloo.run(saved_and_loaded, 2, [again])
    assert first[1] and second[1] and first[1] != second[1]

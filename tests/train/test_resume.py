"""A run that ends early and goes on leaves the bits of an uninterrupted one, whatever state its method keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.train import loop, setup
from tests import gloo
from tests.train import whole_run

MOVING = {  # options at which the state of step 1 is not that of a new method
    "adapo": ["method.target=9.0"],
    "aec": ["method.target=9.0", "method.c_max=0.5", "method.delta=0.05"],
    "aer": ["method.alpha_0=0.05"],
    "clip_cov": ["method.r=0.05", "method.w_low=0.01"],
    "entrocraft": [],
    "entropic": ['method.target={kind = "linear", start = 3.0, end = 1.0, steps = 4}', "method.surrogate=gspo"],
    "entropy_advantage_ppo": ["method.critic_only_steps=1"],
    "mai_clip": ["method.target=9.0"],
    "ppo": ["method.critic_only_steps=1"],
    "repo": ["method.target=9.0", "method.zeta_0=0.02"],
    "siren": ["method.coef=1.0"],
}


VARIANTS = {  # of the authors' code, and others whose state moves at another place
    "aec, authors": [
        "method.target=9.0",
        "method.c_max=0.5",
        "method.c_0=0.1",
        "method.measure=logprob",
        "method.gate=previous",
    ],
    "entrocraft, authors": ["method.variant=authors", "reward.wrong=-1.0"],
    "entropic, authors": ["method.target=1.0", "method.scope=micro_batch", "method.normaliser=high"],
    "mai_clip, entropy": ["method.target=9.0", "method.measure=entropy"],
    "siren, authors": ["method.coef=1.0", "method.scope=micro_batch", "method.nucleus=exclusive"],
}


def recipe(name: str) -> str:
    return f"{name}/{name}-tiny-cpu.toml"


@pytest.mark.parametrize("variant", [*methods.METHODS, *VARIANTS])
def test_a_killed_method_goes_on_with_its_state(variant: str, tmp_path: Path) -> None:
    name, options = variant.partition(",")[0], VARIANTS.get(variant) or MOVING.get(variant, [])
    assert whole_run.train(tmp_path / "whole", recipe(name), *options) == 0
    whole_run.train_and_die(tmp_path / "killed", recipe(name), *options, after=1)
    first = tmp_path / "killed" / "run" / "checkpoints" / "step_000001" / "state.pt"
    saved = torch.load(first, weights_only=True)["state"]["method"]
    fresh = methods.create(load_config(whole_run.RECIPES / recipe(name), options).method).state_dict()
    assert saved.keys() == fresh.keys()
    assert (saved != fresh) == bool(fresh), f"{name} keeps state: add options to MOVING that move it in the first step"
    assert whole_run.train(tmp_path / "killed", recipe(name), *options) == 0
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 2) == whole_run.contents(tmp_path / "whole", 2)


def test_a_method_that_keeps_something_else_now_is_refused_with_a_message(tmp_path: Path) -> None:
    """As one of your own that has changed since the run began."""
    assert whole_run.train(tmp_path, recipe("aer"), "train.steps=1") == 0
    gloo.run(_with_another_state, 1, tmp_path)


def _with_another_state(rank: int, world: int, folder: Path) -> None:
    kind: Any = methods.METHODS["aer"]
    kind.state_dict = lambda self: {"another": 1.0}
    with pytest.raises(ConfigError, match="resume: AER keeps .'another'. but the checkpoint holds"):
        whole_run._rank(rank, world, folder, recipe("aer"), ("train.steps=2",), None)


def test_dynamic_sampling_goes_on_where_it_drew_last(tmp_path: Path) -> None:
    options = ("rollout.dynamic_sampling=true", "train.steps=3")
    assert whole_run.train(tmp_path / "whole", recipe("clip_higher"), *options) == 0
    whole_run.train_and_die(tmp_path / "killed", recipe("clip_higher"), *options, after=2)
    assert whole_run.train(tmp_path / "killed", recipe("clip_higher"), *options) == 0
    steps = whole_run.metrics(tmp_path / "whole")
    assert all(step["group/equal_rewards"] == 0 or step["dynamic/filled"] > 0 for step in steps)
    assert max(step["dynamic/generations"] for step in steps) > 1
    assert whole_run.metrics(tmp_path / "killed") == steps
    assert whole_run.contents(tmp_path / "killed", 3) == whole_run.contents(tmp_path / "whole", 3)


def test_a_run_with_one_update_a_step_goes_on(tmp_path: Path) -> None:
    """Its old log-probs are those of the update itself (tests/train/test_passes.py)."""
    options = ("train.mini_batch_prompts=4", "train.steps=3", "parallel.pipeline=2", "log.samples=2")
    assert whole_run.train(tmp_path / "whole", recipe("entropy_bonus"), *options, world=2) == 0
    whole_run.train_and_die(tmp_path / "killed", recipe("entropy_bonus"), *options, after=2, world=2)
    assert whole_run.train(tmp_path / "killed", recipe("entropy_bonus"), *options, world=2) == 0
    steps = whole_run.metrics(tmp_path / "whole")
    assert [step["kl/old"] for step in steps] == [0.0] * 3 and all(step["grad/norm"] > 0 for step in steps)
    assert max(step["mismatch/max"] for step in steps) < 1e-4
    assert whole_run.metrics(tmp_path / "killed") == steps
    assert whole_run.contents(tmp_path / "killed", 3) == whole_run.contents(tmp_path / "whole", 3)


def test_groups_dealt_over_ranks_are_dealt_the_same_again(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path / "whole", recipe("siren"), "train.steps=3", world=2) == 0
    whole_run.train_and_die(tmp_path / "killed", recipe("siren"), "train.steps=3", after=2, world=2)
    assert whole_run.train(tmp_path / "killed", recipe("siren"), "train.steps=3", world=2) == 0
    steps = whole_run.metrics(tmp_path / "whole")
    assert all(1 <= step["data/imbalance"] < 1.5 for step in steps)
    assert whole_run.metrics(tmp_path / "killed") == steps
    assert whole_run.contents(tmp_path / "killed", 3) == whole_run.contents(tmp_path / "whole", 3)


def draws(rank: int, world: int, folder: Path, steps: int, extra: int) -> list[float]:
    """A random number of each step of a run whose engine draws ``extra`` ones when it is made."""
    module: Any = loop
    before: Any = setup
    create, step, found = setup.create_engine, loop.train_step, []

    def created(*args: Any, **named: Any) -> Any:
        torch.rand(extra)
        return create(*args, **named)

    def stepped(trainer: loop.Trainer, watch: Any) -> Any:
        found.append(float(torch.rand(())))
        return step(trainer, watch)

    before.create_engine, module.train_step = created, stepped
    whole_run._rank(rank, world, folder, recipe("siren"), (f"train.steps={steps}",), None)
    return found


def test_random_numbers_go_on_whatever_the_start_draws(tmp_path: Path) -> None:
    whole_run.data()
    whole = gloo.run(draws, 1, tmp_path / "whole", 3, 2)[0]
    assert len(set(whole)) == 3
    assert gloo.run(draws, 1, tmp_path / "parts", 2, 2)[0] == whole[:2]
    assert gloo.run(draws, 1, tmp_path / "parts", 3, 9)[0] == whole[2:]

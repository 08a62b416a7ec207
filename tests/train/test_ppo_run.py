"""A PPO run killed and continued ends with the bits of one that was not: critic, its optimizer, the steps begun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.whole_run import contents, metrics, train, train_and_die

RECIPE = "ppo/ppo-tiny-cpu.toml"
OPTIONS = (
    *("train.steps=5", "checkpoint.every=2", "method.critic_only_steps=3", "critic.warmup_steps=9"),
    *("rollout.prompts=2", "train.mini_batch_prompts=1", "parallel.tensor=2"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, RECIPE, *OPTIONS, world=2) == 0
    return folder


def test_a_killed_run_goes_on_to_the_bits_of_an_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    train_and_die(tmp_path, RECIPE, *OPTIONS, after=2, world=2)
    assert len(metrics(tmp_path)) == 2
    assert train(tmp_path, RECIPE, *OPTIONS, world=2) == 0
    assert metrics(tmp_path) == metrics(whole)
    assert contents(tmp_path, 5) == contents(whole, 5)


def test_the_checkpoint_holds_both_schedules_and_the_steps(whole: Path) -> None:
    state = torch.load(whole / "run/checkpoints/step_000005/state.pt", weights_only=True)
    assert state["state"]["method"] == {"step": 5} and set(state["scheduler"]) == {"policy", "critic"}
    assert state["scheduler"]["critic"]["num_steps"] == 1 + 5 * 2  # two updates a step
    assert state["scheduler"]["policy"]["num_steps"] == 1 + 2 * 2  # it sat out three steps


def test_what_a_run_reports(whole: Path) -> None:
    steps = metrics(whole)
    assert ["loss/policy" in step for step in steps] == [False, False, False, True, True]
    for name in ("loss/value", "critic/value", "critic/return", "critic/clipped", "critic/grad_norm"):
        assert all(isinstance(step[name], float) for step in steps), name
    assert all("critic/explained_variance" in step for step in steps)
    assert steps[0]["critic/value"] == 0 and steps[1]["critic/value"] != 0
    warmed_up = [4e-4 * share / 9 for share in (1.5, 3.5, 5.5, 7.5, 9)]
    assert [step["critic/lr"] for step in steps] == pytest.approx(warmed_up)

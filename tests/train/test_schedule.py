"""The learning rate of every step, as it is trained with and reported, and what a resumed run does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train.method_factory import create_method
from megatron_ext.train.resume import check_resume
from tests.train import whole_run
from tests.train.whole_run import RECIPES

RECIPE = "grpo/grpo-tiny-cpu.toml"
ONE_UPDATE = ("train.mini_batch_prompts=4", "optimizer.lr=8e-4")
LINEAR = ('optimizer.schedule="linear"', "optimizer.min_lr=2e-4")
COSINE = ('optimizer.schedule="cosine"', "optimizer.warmup_steps=2")


def rates(folder: Path, key: str = "optimizer/lr") -> list[float]:
    return [step[key] for step in whole_run.metrics(folder)]


def test_linear_over_the_run(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path, RECIPE, *ONE_UPDATE, *LINEAR, "train.steps=3") == 0
    assert rates(tmp_path) == pytest.approx([8e-4, 6e-4, 4e-4])  # 2e-4 would be the fourth


def test_cosine_after_a_warm_up_falls_to_zero(tmp_path: Path) -> None:
    """Two updates a step, whose mean is reported: 8e-4 times .5, 1 | .75, .25, and then nothing is learnt."""
    options = (*COSINE, "optimizer.lr=8e-4", "optimizer.decay_steps=4", "train.steps=3")
    assert whole_run.train(tmp_path, RECIPE, *options) == 0
    assert rates(tmp_path) == pytest.approx([6e-4, 4e-4, 0])


def each_update(folder: Path, *options: str) -> list[list[float]]:
    """The learning rate of every update, step by step."""
    found: list[list[float]] = []
    real = TrainableModel.update

    def update(self: TrainableModel, max_bad_steps: int) -> tuple[float, float]:
        norm, lr = real(self, max_bad_steps)
        with (folder / "rates").open("a") as file:
            file.write(f"{lr!r}\n")
        return norm, lr

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainableModel, "update", update)  # the forked ranks take it along
        assert whole_run.train(folder, RECIPE, *options) == 0
    rates = [float(line) for line in (folder / "rates").read_text().splitlines()]
    for start in range(0, len(rates), 2):
        found.append(rates[start : start + 2])
    return found


def test_a_warm_up_of_training_steps_keeps_the_rate_within_a_step(tmp_path: Path) -> None:
    """Two updates a step: by updates the warm-up of 3 is over in the second step, by rollouts after the third."""
    options = ("optimizer.warmup_steps=3", "optimizer.lr=6e-4", "train.steps=4", "checkpoint.every=0")
    by_updates = each_update(tmp_path / "updates", *options)
    by_rollouts = each_update(tmp_path / "rollouts", *options, 'optimizer.step_unit="rollout"')
    assert by_updates == [pytest.approx(pair) for pair in ([2e-4, 4e-4], [6e-4, 6e-4], [6e-4, 6e-4], [6e-4, 6e-4])]
    assert by_rollouts == [pytest.approx(pair) for pair in ([2e-4, 2e-4], [4e-4, 4e-4], [6e-4, 6e-4], [6e-4, 6e-4])]
    assert all(first == second for first, second in by_rollouts)


def test_a_killed_run_of_the_rollout_unit_goes_on_along_its_curve(tmp_path: Path) -> None:
    """The decay, too, counts training steps, and by default ends with the run's last."""
    options = (*LINEAR, 'optimizer.step_unit="rollout"', "optimizer.lr=8e-4", "optimizer.warmup_steps=1")
    assert whole_run.train(tmp_path / "whole", RECIPE, *options, "train.steps=4") == 0
    whole_run.train_and_die(tmp_path / "killed", RECIPE, *options, "train.steps=4", after=2)
    assert whole_run.train(tmp_path / "killed", RECIPE, *options, "train.steps=4") == 0
    assert rates(tmp_path / "whole") == pytest.approx([8e-4, 6.5e-4, 5e-4, 3.5e-4])
    assert whole_run.contents(tmp_path / "killed", 4) == whole_run.contents(tmp_path / "whole", 4)


def test_siren_warms_up_for_five_rollouts_of_sixteen_updates() -> None:
    config = read_config(RECIPES / "siren" / "siren-qwen2.5-math-7b-2n8g.toml")
    assert (config.optimizer.warmup_steps, config.optimizer.step_unit, config.updates_per_step) == (5, "rollout", 16)


def test_a_killed_run_goes_on_along_its_curve(tmp_path: Path) -> None:
    options = (*ONE_UPDATE, *LINEAR, "optimizer.warmup_steps=1", "train.steps=4")
    assert whole_run.train(tmp_path / "whole", RECIPE, *options) == 0
    whole_run.train_and_die(tmp_path / "killed", RECIPE, *options, after=2)
    assert whole_run.train(tmp_path / "killed", RECIPE, *options) == 0
    assert rates(tmp_path / "whole") == pytest.approx([8e-4, 6.5e-4, 5e-4, 3.5e-4])
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 4) == whole_run.contents(tmp_path / "whole", 4)


def test_a_longer_run_does_not_bend_its_curve(tmp_path: Path) -> None:
    options = (*ONE_UPDATE, *LINEAR)
    assert whole_run.train(tmp_path, RECIPE, *options, "train.steps=2") == 0
    with pytest.raises(AssertionError, match="falls over 2 optimizer steps.*over 4.*set optimizer.decay_steps=2"):
        whole_run.train(tmp_path, RECIPE, *options, "train.steps=4")
    assert whole_run.train(tmp_path, RECIPE, *options, "train.steps=4", "optimizer.decay_steps=2") == 0
    assert rates(tmp_path) == pytest.approx([8e-4, 5e-4, 2e-4, 2e-4])


def test_policy_and_critic_each_end_with_the_run(tmp_path: Path) -> None:
    """The policy sits out the first step, and its curve begins with the second."""
    options = (
        *("rollout.prompts=2", "train.mini_batch_prompts=2", "train.steps=3", "method.critic_only_steps=1"),
        *("optimizer.lr=8e-4", "critic.lr=6e-4", 'optimizer.schedule="cosine"', 'critic.schedule="linear"'),
    )
    assert whole_run.train(tmp_path, "ppo/ppo-tiny-cpu.toml", *options) == 0
    steps = whole_run.metrics(tmp_path)
    assert [step["critic/lr"] for step in steps] == pytest.approx([6e-4, 4e-4, 2e-4])
    assert "optimizer/lr" not in steps[0]
    assert [step["optimizer/lr"] for step in steps[1:]] == pytest.approx([8e-4, 4e-4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear", "warmup_steps": 100}, "optimizer.warmup_steps: 100 .* ends after 100"),
        ({"schedule": "cosine", "warmup_steps": 7, "decay_steps": 7}, "7 optimizer steps .* ends after 7"),
        ({"schedule": "cosine", "warmup_steps": 100, "step_unit": "rollout"}, "100 training steps .* ends after 100"),
    ],
)
def test_a_warm_up_that_leaves_nothing_to_the_decay(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_method(Config.model_validate({"optimizer": options}))


def test_a_checkpoint_older_than_a_key_had_its_default() -> None:
    current = Config().model_dump()
    saved = Config().model_dump()
    del saved["optimizer"]["schedule"]
    check_resume(saved, current)
    current["optimizer"]["schedule"] = "linear"
    with pytest.raises(ConfigError, match="optimizer.schedule: checkpoint 'constant', now 'linear'"):
        check_resume(saved, current)

"""An unknown key is answered with the one that is meant, in the words of the stack that it comes from too."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_ext.config.aliases import ALIASES, find, keys
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config, with_defaults
from megatron_ext.config.schema import Config, ImportanceConfig
from megatron_ext.methods import METHODS
from megatron_ext.train.method_factory import create_method

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo" / "grpo-tiny-cpu.toml"
OPTIONS = {f"method.{field.name}" for cls in METHODS.values() for field in dataclasses.fields(cls) if field.init}
OURS = {*keys(Config), *OPTIONS, "method.name"}


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        create_method(read_config(RECIPE, list(overrides)))
    return str(caught.value)


def test_keys_are_those_of_the_configuration() -> None:
    assert {"name", "rollout.samples", "rollout.servers.num", "model.fusions.rope", "critic.lr", "method"} <= OURS
    assert "rollout" not in OURS and "rollout.servers" not in OURS


def test_every_answer_is_a_key_of_ours_and_no_key_of_ours_is_asked_for() -> None:
    assert len(ALIASES) >= 150
    for name, answer in ALIASES.items():
        named = re.findall(r"^[a-z_0-9.]+|(?<= and )[a-z_0-9.]+", answer)
        assert named and set(named) <= OURS, (name, answer)
        mentioned = re.findall(r"\b(?:rollout|method|model|data|train)\.[a-z_0-9.]+", answer)
        assert set(mentioned) <= OURS, (name, answer)
    for key in OURS - {"method"}:
        assert find(key) is None and find(key.split(".")[-1]) is None, key


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("num_generations=8", "num_generations: unknown key; here it is rollout.samples"),
        ("train.num-generations=8", "train.num-generations: unknown key; here it is rollout.samples"),
        ("rollout.n=8", "rollout.n: unknown key; here it is rollout.samples"),
        ("actor_rollout_ref.rollout.n=8", "actor_rollout_ref.rollout.n: unknown key; here it is rollout.samples"),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size=2", "here it is rollout.tensor_parallel_size"),
        ("parallel.tensor_model_parallel_size=2", "here it is parallel.tensor"),
        ("optimizer.learning_rate=1e-6", "optimizer.learning_rate: unknown key; here it is optimizer.lr"),
        ("critic.optim.lr=1e-6", "critic.optim.lr: unknown key; here it is critic.lr"),
        ("actor.optim.lr=1e-6", "actor.optim.lr: unknown key; here it is optimizer.lr"),
        ("kl_loss_coef=0", "kl_loss_coef: unknown key; here it is method.beta"),
        ("method.kl_loss_coef=0", "method.kl_loss_coef: unknown option; here it is method.beta"),
        ("method.clip_ratio_low=0.1", "method.clip_ratio_low: unknown option; here it is method.clip_low"),
        ("rollout.memory_share=0.4", "rollout.memory_share: unknown key; here it is rollout.gpu_memory_utilization"),
        ('method={name="siren", nucleus="reach"}', "method.nucleus: 'reach' is called 'inclusive' now"),
        ("train.importance_cap=2", 'here it is importance.cap (with importance.mode = "truncate")'),
        ("rollout.tensor=2", "here it is rollout.tensor_parallel_size"),
        ("rollout.eager=true", "here it is rollout.enforce_eager"),
        ("rollout.max_completion_length=9", "here it is rollout.max_response_tokens"),
        ("data.train_batch_size=9", "data.train_batch_size: unknown key; here it is rollout.prompts"),
        ("train.train_batch_size=9", "here it is train.mini_batch_prompts (counted in prompts, not in responses)"),
        ("trainer.project_name=x", "trainer: unknown key; did you mean train?"),
        ("lr=1e-6", "lr: unknown key; did you mean optimizer.lr or critic.lr?"),
        ("train.prompts=8", "train.prompts: unknown key; did you mean rollout.prompts?"),
        ("train.stepz=8", "train.stepz: unknown key; did you mean steps?"),
        ("log.zzz=8", "log.zzz: unknown key; known keys: dir, "),
    ],
)
def test_an_unknown_key(override: str, answer: str) -> None:
    assert answer in fault(override)


def test_the_truncated_weights_of_an_old_checkpoint_are_read_under_their_new_keys() -> None:
    for cap, section in ((0.0, ImportanceConfig()), (2.5, ImportanceConfig(mode="truncate", cap=2.5))):
        old = Config().model_dump()
        del old["importance"]
        old["train"]["importance_cap"] = cap
        assert with_defaults(old) == Config(importance=section).model_dump()


def test_an_unknown_key_with_dots_in_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'parent = "{RECIPE}"\n"../../x" = 1\n')
    with pytest.raises(ConfigError, match="../../x: unknown key"):
        read_config(recipe)


def test_a_section_of_another_stack_is_answered_key_by_key() -> None:
    found = fault("actor_rollout_ref={rollout={n=8, zzz=1}, actor={ppo_mini_batch_size=8}}")
    assert "actor_rollout_ref.rollout.n: unknown key; here it is rollout.samples\n" in found
    assert "actor_rollout_ref.rollout.zzz: unknown key; not known here\n" in found
    assert "actor_rollout_ref.actor.ppo_mini_batch_size: unknown key; here it is train.mini_batch_prompts" in found


def test_a_fault_is_said_of_the_place_where_it_stands(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'parent = "{RECIPE}"\nnum_generations = 8\n[train]\nsteps = 0\n[optimizer]\nlr = 2\n')
    found = fault_of(recipe, "train.stepz=1", "optimizer.lr=-1", "log={zzz=1}")
    on_it, below = found.split(f"{recipe}:\n")
    assert on_it.startswith("on the command line:\n") and on_it.count("\n") == 4
    assert "train.stepz" in on_it and "optimizer.lr" in on_it and "log.zzz" in on_it
    assert "num_generations" in below and "train.steps: Input should be greater" in below and "lr" not in below
    assert "command line" not in fault_of(recipe)


def fault_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(recipe, list(overrides))
    return str(caught.value)

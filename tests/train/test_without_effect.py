"""Keys that nothing reads are told, those of the shipped recipes are all read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.train.method_factory import create_method
from megatron_ext.train.without_effect import without_effect
from tools.dry_run import full_size_recipes
from tools.plan import read_valid

RECIPES = Path(__file__).parents[2] / "recipes"
GRPO, SENT = RECIPES / "grpo/grpo-tiny-cpu.toml", RECIPES / "sent/sent-tiny-cpu.toml"


def told(recipe: Path, *overrides: str) -> list[str]:
    config = load_config(recipe, list(overrides))
    return without_effect(config, create_method(config))


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        (['validation.data="recipes/tiny/data/eval.jsonl"'], "validation.data", ["validation.every=10"]),
        (["rollout.oversample=3"], "rollout.oversample", ["rollout.dynamic_sampling=true"]),
        (["importance.cap=3"], "importance.cap", ['importance.mode="truncate"']),
        (["rollout.enforce_eager=true"], "rollout.enforce_eager", ['rollout.engine="vllm"']),
        (["rollout.servers.num=2"], "rollout.servers", ['rollout.engine="vllm_server"']),
        (["critic.lr=1e-3"], "critic.lr", ["method.name=ppo", "method.critic_only_steps=1"]),
        (["rollout.max_lag=60", "train.steps=60"], "rollout.max_lag", ["train.steps=61"]),
        (["optimizer.warmup_steps=240", "train.steps=60"], "optimizer.lr", ["train.steps=61"]),
        (
            ["method.name=clip_higher", "method.overlong_max=40", "method.overlong_buffer=8"],
            "method.overlong_max",
            ["method.overlong_buffer=9"],
        ),
    ],
)
def test_a_key_that_nothing_reads_is_told_until_something_does(
    overrides: list[str], key: str, remedy: list[str]
) -> None:
    lines = told(GRPO, *overrides)
    assert len(lines) == 1 and lines[0].startswith(f"{key}: ")
    assert told(GRPO, *overrides, *remedy) == []


def test_stages_behind_the_end_are_told() -> None:
    assert told(SENT, "data.stage_starts=[30]", "train.steps=31") == []
    [line] = told(SENT, "data.stage_starts=[30]", "train.steps=30")
    assert line.startswith("data.stage_starts: stages after 30 steps")


def test_the_shipped_recipes_set_nothing_in_vain() -> None:
    recipes = [*full_size_recipes(), *RECIPES.glob("*/*tiny-cpu.toml")]
    assert len(recipes) > 90
    for recipe in recipes:
        config = read_valid(recipe)
        assert without_effect(config, create_method(config)) == [], recipe


def test_a_penalty_for_length_is_bounded_by_the_longest_response() -> None:
    options = ["method.name=clip_higher", "method.overlong_buffer=4", "rollout.max_response_tokens=32"]
    create_method(load_config(GRPO, [*options, "method.overlong_max=32"]))
    with pytest.raises(ConfigError, match=r"overlong_max: 31, but responses may have .* = 32 tokens"):
        create_method(load_config(GRPO, [*options, "method.overlong_max=31"]))

"""Whole runs of a model with experts, its engine in bf16 and its trainer in fp32, with replay and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from tests import tiny
from tests.train import whole_run

RECIPE = "entropy_bonus/entropy_bonus-tiny-cpu.toml"  # whose gradient is not 0 where all rewards are equal
REPLAY = "rollout.routing_replay=true"
IN_BF16 = 'rollout.options.dtype="bfloat16"'  # of the engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "moe"
    return tiny.experts_model(folder, layers=4, experts=8, dtype=torch.bfloat16)


def common(model: Path, *more: str) -> tuple[str, ...]:
    return (f'model.path="{model}"', 'model.dtype="float32"', "alarms.mismatch=0", *more)


def test_a_run_with_replay_stays_nearer_to_its_engine(model: Path, tmp_path: Path) -> None:
    for name, options in (("off", ()), ("on", (REPLAY,))):
        assert whole_run.train(tmp_path / name, RECIPE, *common(model, IN_BF16, *options)) == 0
    off, on = (whole_run.metrics(tmp_path / name) for name in ("off", "on"))
    for without, replayed in zip(off, on, strict=True):
        assert replayed["mismatch/mean"] < 0.8 * without["mismatch/mean"]
        assert replayed["routing/differing"] > 0.005 and replayed["routing/unknown"] == 0
        assert not any(name.startswith("routing/") for name in without)


def test_a_replaying_run_is_the_same_under_another_layout_and_without_a_pass_before_its_update(
    model: Path, tmp_path: Path
) -> None:
    """Two updates a step, each rank two stages; and one update, which measures the old policy itself. What the sampler
    kept is replayed too."""
    runs = {
        "one": (1, ()),
        "many": (4, ("parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true", "parallel.virtual=2")),
        "single": (1, ("train.mini_batch_prompts=4", 'model.recompute="full"')),
    }
    steps = []
    for name, (world, options) in runs.items():
        assert (
            whole_run.train(
                tmp_path / name, RECIPE, *common(model, IN_BF16, REPLAY, "rollout.top_k=12", *options), world=world
            )
            == 0
        )
        steps.append(whole_run.metrics(tmp_path / name))
    one, many, single = steps
    for name in ("loss/policy", "entropy/full", "mismatch/mean", "grad/norm", "routing/differing"):
        assert many[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name
    assert one[0]["grad/norm"] > 0
    for name in ("entropy/full", "mismatch/mean", "routing/differing"):
        assert single[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (),
            r"rollout.routing_replay: true, but the model has no experts: there is no num_experts in .*config.json;",
        ),
        (
            ('rollout.engine="vllm_server"',),
            "rollout.routing_replay: true, but rollout.engine is vllm_server, .* expected hf or vllm. Set rollout",
        ),
        (
            ('rollout.engine="vllm"', 'rollout.model_runner="v1"'),
            r"rollout.model_runner: v1, but vLLM tells the experts of its tokens .* with its model runner V2 only; set",
        ),
        (
            ('rollout.engine="vllm"', "rollout.tensor_parallel_size=2", "parallel.ranks_per_node=2"),
            r"rollout.tensor_parallel_size: 2, but in an engine of several ranks .* to the first alone",
        ),
    ],
)
def test_replay_is_refused_where_there_is_nothing_to_replay(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(whole_run.RECIPES / RECIPE, [REPLAY, *options])

"""model.deterministic: a training step has the same bits at every tensor-parallel size."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.deterministic_checks import deterministic_faults
from megatron_ext.config.schema import Config, ModelConfig, ParallelConfig
from megatron_ext.model import deterministic
from tests import gloo, tiny, warm
from tests.train.test_invariance import SIREN, one_step, worst

ROOT = Path(__file__).parents[2]
SIZES = (1, 2, 4)
VOCAB = 64
BUDGET = 60  # tokens of a micro-batch: several are summed


def exact_step(rank: int, world: int, path: str, layout: tuple, fused_head: bool, exact: bool) -> Any:
    return one_step(rank, world, path, layout, SIREN, fused_head=fused_head, deterministic=exact)


def step(path: Path, tensor: int, *, exact: bool = True, fused_head: bool = False) -> tuple[dict, dict[str, Tensor]]:
    """Metrics and whole gradients of one mini-batch, which all ranks agree on."""
    layout = (tensor, 1, 1, False, BUDGET)
    first, *others = gloo.run(exact_step, tensor, str(path), layout, fused_head, exact)
    for metrics, gradients in others:
        assert metrics == first[0]
        assert different(gradients, first[1]) == []
    return first


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("kind", "tied", "fused_head"),
    [("qwen2", False, False), ("qwen3", True, False), ("llama", False, True), ("qwen3", False, True)],
)
def test_metrics_and_gradients_have_the_same_bits_at_every_size(kind: str, tied: bool, fused_head: bool) -> None:
    _, path = tiny.hf_model(kind, tied, VOCAB)
    metrics, gradients = step(path, 1, fused_head=fused_head)
    for size in SIZES[1:]:
        found, others = step(path, size, fused_head=fused_head)
        assert found == metrics, size
        assert different(others, gradients) == [], size
    plain, expected = step(path, 1, exact=False)  # which test_invariance compares with the formula
    assert worst(gradients, expected) < 1e-5
    assert metrics["grad/norm"] == pytest.approx(plain["grad/norm"], rel=1e-6)


def test_without_it_the_bits_differ() -> None:
    _, path = tiny.hf_model("qwen2", False, VOCAB)
    assert different(step(path, 1, exact=False)[1], step(path, 4, exact=False)[1])


def norm_of_shares(rank: int, world: int, values: Tensor, ways: int) -> float:
    cpu_compat.enter()
    own = values.chunk(world)[rank]
    return deterministic.norm(list(own.chunk(ways)), torch.distributed.group.WORLD)  # pyright: ignore


def test_the_norm_is_that_of_fp64_in_any_order() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=g) * (torch.randn(10_000, generator=g) * 6).exp()
    expected = float(values.double().norm())
    found = {
        norm
        for order in (torch.arange(10_000), torch.randperm(10_000, generator=g))
        for world in (1, 3)
        for norm in gloo.run(norm_of_shares, world, values[order], 2 + world)
    }
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=1e-14)
    for bad in (torch.nan, torch.inf):
        values[3] = bad
        assert gloo.run(norm_of_shares, 2, values, 3) == [torch.inf, torch.inf]
    assert gloo.run(norm_of_shares, 2, torch.zeros(5), 1) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("model", "parallel", "hf", "message"),
    [
        ({"dtype": "bfloat16"}, {}, {}, "model.dtype: .* covers float32 alone, found bfloat16"),
        ({}, {"pipeline": 2, "ranks_per_node": 2}, {}, "parallel.pipeline: .* covers 1 alone, found 2"),
        ({}, {"ranks_per_node": 2}, {}, "one copy of the model, found 2 data-parallel ones"),
        ({}, {"tensor": 2, "ranks_per_node": 2, "sequence": True}, {}, "parallel.sequence: .* found true"),
        ({}, {"tensor": 8, "ranks_per_node": 8}, {}, "4 key-value heads.* 4 blocks, found 8 ranks; .*.1, 2, 4"),
        ({}, {}, {"num_experts": 4}, "covers no mixture of experts"),
        ({"fused_head": True}, {}, {"vocab_size": 68}, "divisible by 8, found 68; set model.fused_head = false"),
    ],
)  # fmt: skip
def test_what_it_does_not_cover_is_an_error(model: dict, parallel: dict, hf: dict, message: str) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48, "vocab_size": VOCAB}
    config = Config(
        model=ModelConfig.model_validate({"dtype": "float32", "deterministic": True} | model),
        parallel=ParallelConfig.model_validate({"ranks_per_node": 1} | parallel),
    )
    [fault] = deterministic_faults(sizes | hf, config)
    assert re.search(message, fault), fault


def run(folder: Path, tensor: int, *overrides: str) -> tuple[list[dict], dict[str, Tensor]]:
    """Two steps by the real command: metrics, and the weights it ends with.

    Left out are clock readings, and what compares with the engine, whose batches on a rank are others.
    """
    name = f"tensor-{tensor}"
    settings = [
        f'log.dir="{folder}"', f"name={name}", f"parallel.tensor={tensor}", f"parallel.ranks_per_node={tensor}",
        "train.steps=2", "rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2", "log.trackers=[]",
        "model.deterministic=true", *overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for arguments in (
        ["tools.train", "recipes/siren/siren-tiny-cpu.toml", *settings],
        ["tools.convert", "to-hf", str(folder / name), str(folder / f"{name}-hf")],
    ):
        done = warm.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    left_out = ("time/", "speed/", "mismatch/")
    metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith(left_out)} for line in lines]
    return metrics, load_file(folder / f"{name}-hf" / "model.safetensors")


def test_two_steps_of_the_tiny_recipe_end_with_the_same_weights(tmp_path: Path) -> None:
    metrics, weights = run(tmp_path, 1)
    start = load_file(ROOT / "recipes/tiny/base/model.safetensors")
    assert different(weights, start)
    for size in SIZES[1:]:
        found, others = run(tmp_path, size)
        assert different(others, weights) == [], size
        assert found == metrics, size

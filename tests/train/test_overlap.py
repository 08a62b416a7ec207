"""Reductions and gathers between data-parallel ranks run beside computation and change no number."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import (
    AlarmsConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_ext.metrics.display import Watch
from megatron_ext.model import architectures, hf_weights, parallel
from megatron_ext.model.build import Overlap, build_policy
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train.step import Learner
from tests import gloo, tiny
from tests.train import whole_run

OFF = Overlap(overlap_grad_reduce=False, overlap_param_gather=False)
ON = Overlap(bucket_size=700)  # several buckets in every layer of the tiny model
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {  # world, layout, model
    "DP 2": (2, {}, "qwen2"),
    "DP 2, tied": (2, {}, "qwen2 tied"),
    "PP 2 x DP 2": (4, {"pipeline": 2}, "qwen2"),
    "PP 2 x DP 2, tied": (4, {"pipeline": 2}, "qwen2 tied"),
    "VPP 2 x DP 2": (4, {"pipeline": 2, "virtual": 2}, "qwen2"),
    "TP 2 + SP x DP 2": (4, {"tensor": 2, "sequence": True}, "qwen2"),
    "EP 2": (2, {"expert": 2}, "qwen3_moe"),
    "CP 2": (2, {"context": 2}, "qwen2"),
}


def updates(
    rank: int, world: int, path: str, layout: dict[str, Any], overlap: Overlap, options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor], Counter[str]]:
    """Gradient norms of three steps with two updates each, the weights afterwards, and collectives by kind."""
    cpu_compat.enter()
    counts = counted_collectives()
    config = Config(
        parallel=ParallelConfig(ranks_per_node=world, **layout),
        rollout=RolloutConfig(prompts=4, samples=4, max_response_tokens=12),
        train=TrainConfig(mini_batch_prompts=2, micro_batch_tokens=40),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=1e9),  # the norm is summed bucket by bucket: it may round
        method={"name": "siren", "coef": 0.7},
        model=ModelConfig(**options),
        alarms=AlarmsConfig(mismatch=0),  # nothing sampled these episodes
    )
    parallel.initialize(config.parallel)
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build_policy(
        architecture,
        parallel.model_layout(config.parallel),
        ModelOptions(torch.float32),
        overlap=overlap,
        fused_head=config.model.fused_head,
    )
    for module in policy.modules:
        hf_weights.load_weights(module, architecture, path)
    buckets = len(policy.chunks[0].bucket_groups)
    several = overlap.overlap_grad_reduce and parallel.groups.pipeline().rank() == 0
    assert buckets > 4 if several else buckets <= 2
    actor = TrainableModel.build(policy, config.optimizer)
    learner = Learner(config, methods.create(config.method), actor)
    ranks, rank_of_data = config.parallel.data, parallel.groups.data().rank()
    norms = []
    for seed in range(3):
        if config.model.offload_optimizer:
            actor.offload()
            actor.restore()
        own = [each for each in tiny.episodes(seed=seed) if each.group % ranks == rank_of_data]
        metrics, _ = learner.step(own, Watch(3, show=False))
        norms.append(torch.tensor(metrics["grad/norm"]))
    return norms, dict(hf_weights.PolicyWeights(policy)), counts


def counted_collectives() -> Counter[str]:
    """Counts Megatron's data-parallel collectives, those that return before they are done apart."""
    counts: Counter[str] = Counter()
    module: Any = param_and_grad_buffer
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        original = getattr(module, name)

        def call(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            counts[name + (" overlapped" if options["async_op"] else "")] += 1
            return original(*arguments, **options)

        setattr(module, name, call)
    return counts


@functools.cache
def plain(case: str, fused_head: bool) -> list:
    return run(case, OFF, {"fused_head": fused_head})


def run(case: str, overlap: Overlap, options: dict[str, Any]) -> list:
    world, layout, kind = LAYOUTS[case]
    name, *tied = kind.split()
    _, path = tiny.hf_model(name, bool(tied))
    return gloo.run(updates, world, str(path), layout, overlap, options)


CASES: dict[str, tuple[str, Overlap, dict[str, Any]]] = {
    **{case: (case, ON, {}) for case in LAYOUTS},
    "reductions alone": ("DP 2", replace(ON, overlap_param_gather=False), {}),
    "gathers alone": ("DP 2", replace(ON, overlap_grad_reduce=False), {}),
    # the fused head reads the output layer's weight without calling the layer
    "fused head": ("DP 2", ON, {"fused_head": True}),
    "fused head, VPP 2 x DP 2": ("VPP 2 x DP 2", ON, {"fused_head": True}),
    "offloaded optimizer": ("DP 2", ON, {"offload_optimizer": True}),
}


@pytest.mark.parametrize(("case", "overlap", "options"), CASES.values(), ids=CASES)
def test_overlap_changes_no_number(case: str, overlap: Overlap, options: dict[str, Any]) -> None:
    expected = plain(case, options.get("fused_head", False))
    for (norms, weights, counts), (norms_off, weights_off, counts_off) in zip(
        run(case, overlap, options), expected, strict=True
    ):
        torch.testing.assert_close(norms, norms_off, rtol=1e-6, atol=0)
        assert weights.keys() == weights_off.keys()
        assert all(torch.equal(value, weights_off[name]) for name, value in weights.items())
        assert not any("overlapped" in name for name in counts_off)
        for kind, on in (("reduce_scatter", overlap.overlap_grad_reduce), ("all_gather", overlap.overlap_param_gather)):
            assert (counts[f"dist_{kind}_func overlapped"] > 0) == on


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Two data-parallel ranks, several buckets, the optimizer offloaded between updates."""
    recipe, options = "siren/siren-tiny-cpu.toml", ("parallel.bucket_size=5000", "model.offload_optimizer=true")
    assert whole_run.train(tmp_path / "whole", recipe, *options, world=2) == 0
    whole_run.train_and_die(tmp_path / "killed", recipe, *options, after=1, world=2)
    assert whole_run.train(tmp_path / "killed", recipe, *options, world=2) == 0
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 2) == whole_run.contents(tmp_path / "whole", 2)

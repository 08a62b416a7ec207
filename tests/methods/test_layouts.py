"""Every method through the real learner: the same gradients on one rank, under tensor and under data parallelism."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import Config, ImportanceConfig, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.methods.base import Needs
from megatron_ext.metrics.glossary import Glossary
from megatron_ext.model import architectures, build, hf_weights, parallel
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train import mismatch
from megatron_ext.train.step import Learner
from megatron_ext.types import Episode
from tests import gloo, tiny
from tests.methods.cases import OPTIONS
from tests.train.test_invariance import gathered_gradients, moved, worst

# The tiny model is nearly uniform over 61 tokens: thresholds at which its tokens fall on both sides.
TUNED: dict[str, dict[str, Any]] = {
    "dmmpt": {"tau": 0.01, "sigma": 3.8},
    "dmmpt, batch": {"tau": 0.01, "sigma": 3.9},
    "clip_higher": {"overlong_max": 11, "overlong_buffer": 8},
    "forking_tokens": {"overlong_max": 11, "overlong_buffer": 8},
    "entropic": {"threshold": 0.01, "target": 3.2},
    "entropic, authors": {"threshold": 0.01, "target": 3.2},
    "entropic, full": {"target": 3.2},
    "lp_reg, authors": {"rho": 0.6},
}
CORRECTED = {f"grpo, {level} {mode}": (level, mode) for level in ("token", "sequence") for mode in ("truncate", "mask")}
NAMES = [*OPTIONS, *CORRECTED]
LAYOUTS = {  # tensor, pipeline, data, context, budget of a micro-batch
    "one": (1, 1, 1, 1, 1000),
    "tensor": (2, 1, 1, 1, 130),
    "pipeline": (1, 2, 1, 1, 130),
    "data": (1, 1, 2, 1, 80),
    "context": (1, 1, 1, 2, 130),
}


def options_of(name: str) -> dict[str, Any]:
    return OPTIONS["grpo" if name in CORRECTED else name] | TUNED.get(name, {})


def sampled_with(logprob: Tensor, episodes: list[Episode]) -> list[Episode]:
    """The episodes of an engine whose log-probs are these, ``[T]``."""
    parts = logprob.split([len(each.sample.response_ids) for each in episodes])
    return [
        replace(each, sample=replace(each.sample, logprobs=tuple(part.tolist())))
        for each, part in zip(episodes, parts, strict=True)
    ]


def every_method(rank: int, world: int, path: str, layout: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Metrics and whole gradients of one mini-batch of each method, as this rank sees them."""
    tensor, pipeline, data, context, budget = layout
    cpu_compat.enter()
    config = Config(
        parallel=ParallelConfig(ranks_per_node=world, tensor=tensor, pipeline=pipeline, context=context),
        rollout=RolloutConfig(prompts=4, samples=4, max_response_tokens=12),
        train=TrainConfig(mini_batch_prompts=4, micro_batch_tokens=budget),
    )
    parallel.initialize(config.parallel)
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_policy(architecture, parallel.model_layout(config.parallel), ModelOptions(torch.float32))
    hf_weights.load_weights(policy.modules[0], architecture, path)
    optimizer = build.build_optimizer(policy, lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8, clip_grad=1.0)
    scheduler = build.build_scheduler(optimizer, lr=1e-3, warmup_steps=0, weight_decay=0.1)
    episodes = tiny.episodes()
    share = len(episodes) // data
    own = episodes[parallel.groups.data().rank() * share :][:share]
    learner = Learner(config, methods.create({"name": "grpo"}), TrainableModel(policy, optimizer, scheduler))
    [mini_batch] = learner.packer.pack([own])
    rules = {
        rule: learner.statistics(policy, mini_batch, Needs(entropy=True, nucleus_p=0.8, nucleus=rule))
        for rule in ("inclusive", "exclusive")
    }
    found = {}
    for name in NAMES:
        method = learner.method = methods.create(options_of(name))
        level, mode = CORRECTED.get(name, ("token", "off"))
        importance = ImportanceConfig.model_validate({"level": level, "mode": mode, "cap": 1.2})
        learner.config = config.model_copy(update={"importance": importance})
        current = rules[method.needs.nucleus]
        if method.needs.min_p is not None:
            current = learner.statistics(policy, mini_batch, replace(method.needs, entropy=True))
        assert current.entropy is not None
        old = replace(current, logprob=moved(current.logprob, own), entropy=moved(current.entropy, own))
        sampled = sampled_with(current.logprob, own) if name in CORRECTED else own
        rollouts = learner.rollout_batch(sampled, old, current.logprob - 0.1, current.logprob / 4)
        batch = learner.batch(rollouts, method.compute_advantages(rollouts, learner.reduce))
        report = method.on_step_start(batch, current, learner.reduce)
        if name.startswith("siren"):
            method.load_state_dict({"h_anchor": 0.5})
        metrics, _ = learner.gradients(batch, current, mini_batch)
        gradients = {n: g.clone() for n, g in hf_weights.stream(policy, gathered_gradients(policy))}
        report |= mismatch.corrections(batch, importance, learner.reduce)
        found[name] = metrics, report, gradients
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    _, path = tiny.hf_model()
    return {
        name: gloo.run(every_method, math.prod(layout[:4]), str(path), layout, timeout=200)
        for name, layout in LAYOUTS.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_does_not_change_a_method(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    metrics, report, gradients = results["one"][0][name]
    for layout in ("tensor", "pipeline", "data", "context"):
        for rank in results[layout]:
            other_metrics, other_report, other = rank[name]
            assert worst(other, {n: g.double() for n, g in gradients.items()}) < 1e-5
            assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
            assert other_report == pytest.approx(report, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_describes_what_it_reports(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    metrics, report, _ = results["one"][0][name]
    glossary = Glossary(type(methods.create(options_of(name))).glossary())
    for key in metrics | report:
        glossary.require(key)


def test_the_thresholds_are_at_work(results: dict[str, list[dict[str, Any]]]) -> None:
    metrics = {name: values[0] for name, values in results["one"][0].items()}
    assert metrics["clip_cov"]["clip_cov/stopped"] > 0
    assert all(0 < metrics[name]["dmmpt/mastered"] < 0.5 for name in ("dmmpt", "dmmpt, batch"))
    report = {name: values[0] | values[1] for name, values in results["one"][0].items()}
    assert all(0 < report[name].get("importance/truncated", 0.5) < 1 for name in CORRECTED)
    assert all(0 < report[name].get("importance/masked", 0.5) < 1 for name in CORRECTED)
    for name, direction in (("entrocraft", -1), ("entrocraft, above", 1)):
        assert report[name]["entrocraft/direction"] == direction and 0 < report[name]["entrocraft/kept_share"] < 1
    assert report["mai_clip"]["mai_clip/k"] == 0.1 and report["repo"]["repo/zeta"] == 0.6
    assert 0 < abs(report["entropic"]["entropic/alpha"]) < 1 and 0 < report["clip_higher"]["overlong/share"] < 1
    assert all(0 < metrics[name]["erc/stopped"] < 1 for name in ("erc", "erc, preserve"))
    assert all(0 < metrics[name]["lp_reg/held"] < 0.5 for name in ("lp_reg", "lp_reg, authors"))
    assert all(0.3 < metrics[name]["steer/weight"] < 1 for name in ("steer", "steer, authors"))

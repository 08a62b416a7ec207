"""Every method with every surrogate trains a real model: a step of two updates each, all from the same weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_ext import methods
from megatron_ext.config.schema import CriticConfig
from megatron_ext.methods import METHODS, surrogates
from megatron_ext.methods.grpo import GRPO
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.glossary import Glossary
from megatron_ext.model import hf_weights, parallel
from megatron_ext.model.critic import build_critic
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train.step import Learner
from tests import gloo, tiny
from tests.train.test_passes import WIDE, learner_of

AT_ONCE = {name: {"critic_only_steps": 0} for name in ("ppo", "entropy_advantage_ppo")}  # the policy trains at once


def options_of(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "surrogate": kind} | AT_ONCE.get(name, {})


def pairs() -> list[tuple[str, str]]:
    """Methods and surrogates; of a method that is a clip of its own with its own alone."""
    found = []
    for name in METHODS:
        method = methods.create({"name": name})
        assert isinstance(method, GRPO)
        found += [(name, kind) for kind in surrogates.KINDS if kind == "ppo" or not method.is_surrogate]
    return found


def critic_beside(learner: Learner, path: str) -> TrainableModel:
    """A critic with the tiny model's weights."""
    architecture = learner.policy.architecture

    def fill(modules: list) -> None:
        for module in modules:
            hf_weights.load_weights(module, architecture, path)

    layout = parallel.model_layout(learner.config.parallel)
    model = build_critic(architecture, layout, ModelOptions(torch.float32), fill=fill)
    return TrainableModel.build(model, CriticConfig(lr=1e-3), "critic")


def step_of_each(rank: int, world: int, path: str) -> list[tuple[dict[str, float], bool]]:
    """Of each pair the step's metrics, and whether the policy's weights moved; all from the same weights."""
    base = learner_of(path, world, {"name": "sent"}, {}, 2, train=WIDE)  # with a reference model
    critic = critic_beside(base, path)
    trained = (base.actor, critic)
    weights = [p for each in trained for module in each.model.modules for p in module.parameters()]
    first, found = [p.detach().clone() for p in weights], []
    own = [p for module in base.policy.modules for p in module.parameters()]
    for name, kind in pairs():
        method = methods.create(options_of(name, kind))
        reference = base.reference if method.needs.reference else None
        learner = Learner(base.config, method, base.actor, critic if method.needs.value else None, reference)
        metrics, _ = learner.step(tiny.episodes(), Watch(1, show=False))
        moved = any(not torch.equal(p, before) for p, before in zip(own, first[: len(own)], strict=True))
        found.append((metrics, moved))
        with torch.no_grad():
            for p, before in zip(weights, first, strict=True):
                p.copy_(before)
        for each in trained:
            each.restart()
            each.optimizer.reload_model_params()
    return found


def test_every_method_trains_with_every_surrogate() -> None:
    [found] = gloo.run(step_of_each, 1, str(tiny.hf_model()[1]), timeout=400)
    assert len(found) == len(pairs()) > 5 * len(METHODS)
    for (name, kind), (metrics, moved) in zip(pairs(), found, strict=True):
        pair = f"{name} with {kind}"
        assert moved and metrics["grad/norm"] > 0 and metrics["grad/skipped"] == 0, pair
        finite = {key: value for key, value in metrics.items() if key.startswith(("loss/", "clip/", "surrogate/"))}
        assert all(map(math.isfinite, finite.values())) and {"loss/total", "loss/policy"} <= finite.keys(), pair
        assert ("surrogate/weight" in finite) == (kind != "ppo"), pair
        assert finite.get("surrogate/weight", 1.0) > 0, pair
        glossary = Glossary(METHODS[name].glossary())
        for key in metrics:
            glossary.require(key)

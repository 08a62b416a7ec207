"""Every method with every surrogate trains a real model: a step of two updates each, all from the same weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

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
from tests.train.test_passes import WIDE, Apart, learner_of

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


def measured_by_all_models(rank: int, world: int, path: str, layout: dict[str, Any]) -> list[tuple[int, list[Tensor]]]:
    """The passes before the first of four updates, one by one and together: their number, and for each response token
    the log-probs of policy and reference and the critic's value."""
    each_prompt = WIDE.model_copy(update={"mini_batch_prompts": 1})
    base = learner_of(path, world, {"name": "sent"}, layout, train=each_prompt)  # with a reference model
    critic = critic_beside(base, path)
    head: Any = critic.model.modules[-1]
    if hasattr(head, "output_layer"):
        torch.nn.init.normal_(head.output_layer.weight, generator=torch.Generator().manual_seed(0))
    episodes, found = tiny.episodes(), []
    for kind in (Apart, Learner):
        learner = kind(base.config, base.method, base.actor, critic, base.reference)
        parts = [[episodes[i] for i in span] for span in learner.packer.spans(episodes)]
        measured = learner.packer.joined_neighbours(parts, learner.packer.pack(parts))
        rollouts, _ = learner.compute_old_logprobs(episodes, [], measured, Watch(1, show=False))
        assert rollouts.ref_logprob is not None and rollouts.old_value is not None
        found.append((len(measured), [rollouts.old_logprob, rollouts.ref_logprob, rollouts.old_value]))
    return found


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_every_model_says_the_same_of_mini_batches_that_are_measured_together(layout: dict[str, Any]) -> None:
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    for apart, together in gloo.run(measured_by_all_models, world, str(tiny.hf_model()[1]), layout):
        assert (apart[0], together[0]) == (4, 1)
        for expected, seen in zip(apart[1], together[1], strict=True):
            assert expected.std() > 0.01 and torch.allclose(seen, expected, rtol=1e-5, atol=1e-5)

"""Routing replay: the policy's experts are the given ones, whatever the layout; its gates and all gradients its own.

The reference forces the same experts upon transformers' routers, in fp64 and sequence by sequence. They are drawn at
random, far from what any router would choose: an expert that is lost, or given to another token, changes the loss.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_moe import modeling_qwen3_moe

from megatron_ext.rollout.base import RolloutError
from megatron_ext.train import routing
from megatron_ext.train.packing import MiniBatch, pack
from megatron_ext.types import Episode
from tests import gloo, tiny
from tests.train.test_invariance import SIREN, norm, one_step, reference, worst
from tests.train.test_invariance_stages import by_expert

LAYERS, EXPERTS, TOP_K = 4, 4, 2
EPISODES = tiny.episodes()
Router = modeling_qwen3_moe.Qwen3MoeTopKRouter
LAYOUTS = [  # tensor, pipeline, data, sequence, budget of a micro-batch; the rest of the layout
    ((1, 1, 1, False, 1000), {}),
    ((1, 1, 1, False, 23), {"recompute": "full"}),
    ((1, 1, 1, False, 40), {"recompute": "mlp"}),
    ((1, 1, 2, False, 40), {"expert": 2}),
    ((2, 1, 1, True, 60), {"recompute": "full"}),
    ((2, 1, 2, True, 45), {"expert": 2, "expert_tensor": 2}),
    ((1, 2, 1, False, 50), {"recompute": "full"}),
    ((1, 2, 1, False, 50), {"virtual": 2, "recompute": "mlp"}),
    ((1, 3, 1, False, 50), {"stage_layers": (2, 1, 1)}),
    ((2, 2, 1, True, 45), {"virtual": 2, "recompute": "full"}),
]


@functools.cache
def routed() -> list[Episode]:
    """The tiny episodes with experts drawn at random; of the third nothing is known."""
    draw = random.Random(7)

    def experts(tokens: int) -> np.ndarray:
        pairs = [draw.sample(range(EXPERTS), TOP_K) for _ in range(tokens * LAYERS)]
        return np.array(pairs, dtype=np.uint8).reshape(tokens, LAYERS, TOP_K)

    found = []
    for number, episode in enumerate(EPISODES):
        told = None if number == 2 else experts(routing.num_read(episode.sample))
        found.append(replace(episode, sample=replace(episode.sample, routing=told)))
    return found


@contextmanager
def forced() -> Iterator[None]:
    """Within, the n-th call of each of transformers' routers gives the n-th episode's tokens the experts it names."""
    calls: Counter[int] = Counter()
    real = Router.forward

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, gates, chosen = real(self, hidden)
        layer = self.layer
        told = routed()[calls[layer]].sample.routing
        calls[layer] += 1
        if told is None:
            return logits, gates, chosen
        chosen = torch.cat([torch.from_numpy(told[:, layer]).long(), chosen[-1:]])
        gates = logits.softmax(-1).gather(1, chosen)
        return logits, gates / gates.sum(-1, keepdim=True) if self.norm_topk_prob else gates, chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "forward", forward)
        yield


@functools.cache
def formula(kind: str) -> tuple[float, dict[str, Tensor]]:
    model: Any = tiny.hf_model(kind, False)[0]  # the one that the reference copies
    for name, router in model.named_modules():
        if isinstance(router, Router):
            vars(router)["layer"] = int(name.split(".")[2])
    with forced():
        loss, gradients = reference("inclusive", kind)
    return loss, {name: each for whole, value in gradients.items() for name, each in by_expert(whole, value).items()}


def step(rank: int, world: int, path: str, layout: tuple, more: dict[str, Any]) -> Any:
    module: Any = tiny
    module.episodes = routed
    return one_step(rank, world, path, layout, SIREN, routing_replay=True, **more)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_moe_mixed"])
@pytest.mark.parametrize(("layout", "more"), LAYOUTS, ids=str)
def test_replayed_experts_have_the_gradient_of_the_formula(layout: tuple, more: dict[str, Any], kind: str) -> None:
    loss, gradients = formula(kind)
    tensor, pipeline, data, _, _ = layout
    for metrics, found in gloo.run(step, tensor * pipeline * data, str(tiny.hf_model(kind, False)[1]), layout, more):
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad/norm"] == pytest.approx(norm(gradients), rel=1e-5)
        assert worst(found, gradients) < 1e-5

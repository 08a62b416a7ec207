"""Routing replay: the policy's experts are the given ones, whatever the layout; its gates and all gradients its own.

The reference forces the same experts upon transformers' routers, in fp64 and sequence by sequence. They are drawn at
random, far from what any router would choose: an expert that is lost, or given to another token, changes the loss.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from transformers.models.qwen3_moe import modeling_qwen3_moe

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.data.prompts import encode_prompts
from megatron_ext.methods.base import Needs
from megatron_ext.model import architectures, build, hf_weights, parallel
from megatron_ext.model.critic import build_critic, values
from megatron_ext.model.forward import forward
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.rollout.base import Request, RolloutError, Sampling
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.train import routing
from megatron_ext.train.packing import MiniBatch, lay_out_routing, pack
from megatron_ext.types import Episode, PackedSequences, Sample
from tests import gloo, tiny
from tests.train.test_invariance import SIREN, norm, one_step, reference, worst
from tests.train.test_invariance_stages import by_expert
from tools.tiny.task import read

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "recipes" / "tiny" / "moe"
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
    ((1, 1, 1, False, 60), {"context": 2, "recompute": "full"}),
    ((2, 1, 1, True, 60), {"context": 2, "expert": 2}),
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
    world = tensor * pipeline * data * more.get("context", 1)
    for metrics, found in gloo.run(step, world, str(tiny.hf_model(kind, False)[1]), layout, more):
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad/norm"] == pytest.approx(norm(gradients), rel=1e-5)
        assert worst(found, gradients) < 1e-5


def test_experts_stand_at_the_tokens_they_were_told_of() -> None:
    """Not at padding. A response's last token is not read."""
    pairs = [((5, 6, 7), (8, 9)), ((1,), (2, 3))]
    told = [np.arange(8).reshape(4, 1, 2), np.arange(20, 24).reshape(2, 1, 2)]
    [both, empty] = MiniBatch.pack(pairs, [[0, 1], []], multiple=8, routing=told).micro_batches
    assert both.routing is not None and both.routing.dtype == torch.int16
    nobody = [-1, -1]
    known = [[0, 1], [2, 3], [4, 5], [6, 7], [20, 21], [22, 23]]
    assert both.routing[:, 0].tolist() == [*known, nobody, nobody]
    assert empty.routing is None and pack(pairs).routing is None
    assert lay_out_routing([None, told[1]], pack(pairs))[:, 0].tolist() == [nobody] * 4 + known[4:]  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda told: told[1:],
            r"have the shape \[\d+, 4, 2\], expected \[\d+, 4, 2\] \(tokens, layers, experts a token\)",
        ),
        (lambda told: told + 1, r"have the numbers \d to 4, expected 0 to 3"),
        (lambda told: np.zeros_like(told), r"name one expert twice for a token"),
    ],
)
def test_impossible_experts_are_refused(change: Any, message: str) -> None:
    [found] = gloo.run(refused, 1, str(tiny.hf_model("qwen3_moe", False)[1]), change(told_of(routed()[0])))
    assert re.fullmatch(f"rollout.routing_replay: the engine's experts of a response {message}: it samples .*", found)


def told_of(episode: Episode) -> np.ndarray:
    assert episode.sample.routing is not None
    return episode.sample.routing


def build_policy(path: str, **options: Any) -> build.Policy:
    """On one rank, in fp32, with the directory's weights."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=1))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_policy(architecture, ModelLayout(), ModelOptions(torch.float32), **options)
    for module in policy.modules:
        hf_weights.load_weights(module, architecture, path)
    return policy


def refused(rank: int, world: int, path: str, told: np.ndarray) -> str:
    policy = build_policy(path, routing_replay=True)
    episode = replace(routed()[0], sample=replace(routed()[0].sample, routing=told))
    try:
        routing.of_episodes([episode], policy)
    except RolloutError as error:
        return str(error)
    return ""


def packed(samples: list[Sample], *, replayed: bool) -> list[PackedSequences]:
    pairs = [(sample.prompt_ids, sample.response_ids) for sample in samples]
    told = [sample.routing for sample in samples]
    return list(MiniBatch.pack(pairs, [range(len(pairs))], routing=told if replayed else None).micro_batches)


def others(rank: int, world: int, path: str) -> list[tuple[Tensor, Tensor]]:
    """Of policy, reference and critic: what they find with the engine's experts, and without."""
    policy = build_policy(path, routing_replay=True)
    a, options = policy.architecture, ModelOptions(torch.float32)

    def fill(modules: list) -> None:
        for module in modules:
            hf_weights.load_weights(module, a, path)

    frozen = build.build_reference(a, ModelLayout(), options)
    fill(frozen.modules)
    valued = build_critic(a, ModelLayout(), options, fill=fill)
    head: Any = valued.modules[-1].output_layer
    torch.nn.init.ones_(head.weight)
    samples = [episode.sample for episode in routed()]
    batches = [packed(samples, replayed=replayed) for replayed in (True, False)]
    found = []
    for model in (policy, frozen):
        with_experts, without = ((forward(model, each, Needs(), 1.0) or [])[0].logprob for each in batches)
        found.append((with_experts, without))
    with_experts, without = ((values(valued, each) or [])[0] for each in batches)
    return [*found, (with_experts, without)]


def test_the_reference_and_the_critic_choose_their_own_experts() -> None:
    [(policy, frozen, critic)] = gloo.run(others, 1, str(tiny.hf_model("qwen3_moe", False)[1]))
    assert torch.equal(*frozen) and torch.equal(*critic)
    assert not torch.allclose(*policy, atol=0.1)
    assert torch.equal(policy[1], frozen[1])  # nothing told: the policy's own, as of the reference with its weights


def sampled() -> list[Sample]:
    """Answers of the tiny mixture of experts, whose weights are in bf16, to held-out problems."""
    problems = read(ROOT / "recipes/tiny/data/eval.jsonl")
    engine = HFEngine(TRAINED)
    assert engine.model.dtype == torch.bfloat16
    encoded = encode_prompts(engine.tokenizer, problems)
    requests = [Request(ids, seed_of(0, number)) for number, (_, ids) in enumerate(encoded)]
    return engine.generate(requests, Sampling(1.0, 1.0, 24, routing=True))


def compared(rank: int, world: int, path: str, samples: list[Sample]) -> dict[bool, tuple[float, float, float, float]]:
    """With and without replay: of (token, layer) pairs, the share sent to other experts than the engine's, and the
    share whose router would choose others, as counted here and as reported; and KL(engine || trainer), estimated (k3).
    """
    policy = build_policy(path, routing_replay=True)
    own: list[Tensor] = []
    used: list[Tensor] = []

    def read(router: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        used.append(output[1].int().topk(2).indices.sort(-1).values)
        own.append(router.gating(inputs[0])[:, 0].topk(2).indices.sort(-1).values)

    for each in policy.modules[0].modules():
        if isinstance(each, TopKRouter):
            each.register_forward_hook(read)
    told = torch.cat([torch.from_numpy(s.routing).long().sort(-1).values for s in samples if s.routing is not None])
    reported = torch.tensor([logprob for sample in samples for logprob in sample.logprobs])
    found = {}
    for replayed in (True, False):
        used.clear()
        own.clear()
        policy.routing.begin_count()  # pyright: ignore[reportOptionalMemberAccess]
        [stats] = forward(policy, packed(samples, replayed=replayed), Needs(), 1.0) or []
        elsewhere, choice = (float((torch.stack(each, 1) != told).any(-1).float().mean()) for each in (used, own))
        gap = stats.logprob - reported
        share = policy.routing.differing()  # pyright: ignore[reportOptionalMemberAccess]
        found[replayed] = (elsewhere, choice, share, float((gap.exp() - 1 - gap).mean()))
    return found


def test_an_engine_in_lower_precision_and_the_trainer_use_the_same_experts() -> None:
    [found] = gloo.run(compared, 1, str(TRAINED), sampled())
    elsewhere, choice, reported, replayed_kl = found[True]
    assert elsewhere == 0 and 0 < choice == pytest.approx(reported, rel=1e-6)
    without, _, unmeasured, kl = found[False]
    assert without >= choice > 0.002 and unmeasured == 0
    assert replayed_kl < 0.7 * kl

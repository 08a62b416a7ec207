"""One optimizer step of SIREN: the same loss and gradients under every layout and every split of the batch.

The reference is the paper's formula in fp64 autograd on the full logits of the transformers model.
Gradients are compared before Adam, whose first step would amplify rounding.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import Config, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import architectures, build, hf_weights, parallel
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train.step import Learner
from tests import gloo, tiny

TEMPERATURE = 0.8
ANCHOR = 0.5
SIREN = {"name": "siren", "coef": 0.7, "p": 0.8, "tau": 0.6}
LAYOUTS = [  # tensor, pipeline, data, sequence, budget of a micro-batch
    (1, 1, 1, False, 1000),
    (1, 1, 1, False, 23),
    (2, 1, 1, False, 60),
    (4, 1, 1, False, 1000),
    (1, 2, 1, False, 50),
    (1, 1, 2, False, 40),
    (2, 1, 1, True, 60),
    (2, 2, 1, True, 45),
    (2, 1, 2, False, 33),
]


def one_step(
    rank: int,
    world: int,
    path: str,
    layout: tuple,
    method: dict,
    break_sum: bool = False,
    fused_head: bool = False,
    recompute: str = "none",
    routing_replay: bool = False,
    deterministic: bool = False,
    share_prompts: bool = True,
    **more: Any,
) -> Any:
    """Metrics and whole gradients of one mini-batch, as this rank sees them; ``more`` of the layout's fields."""
    tensor, pipeline, data, sequence, budget = layout
    cpu_compat.enter()
    config = Config(
        parallel=ParallelConfig(ranks_per_node=world, tensor=tensor, pipeline=pipeline, sequence=sequence, **more),
        rollout=RolloutConfig(prompts=4, samples=4, temperature=TEMPERATURE, max_response_tokens=12),
        train=TrainConfig(mini_batch_prompts=4, micro_batch_tokens=budget, share_prompts=share_prompts),
        method=method,
    )
    parallel.initialize(config.parallel)
    architecture = architectures.read_architecture(read_hf_config(path))
    spread = parallel.model_layout(config.parallel)
    options = ModelOptions(torch.float32, recompute, deterministic=deterministic)
    policy = build.build_policy(architecture, spread, options, fused_head=fused_head, routing_replay=routing_replay)
    for module in policy.modules:
        hf_weights.load_weights(module, architecture, path)
    optimizer = build.build_optimizer(policy, lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8, clip_grad=1.0)
    scheduler = build.build_scheduler(optimizer, lr=1e-3, warmup_steps=0, weight_decay=0.1)
    learner = Learner(config, methods.create(method), TrainableModel(policy, optimizer, scheduler))
    if break_sum:
        learner.reduce.sum = lambda value: value  # the all-reduce left out
    learner.method.load_state_dict({"h_anchor": ANCHOR})
    share = len(tiny.episodes()) // data
    own = tiny.episodes()[parallel.groups.data().rank() * share :][:share]
    [mini_batch] = learner.packer.pack([own])
    if budget > 100 and architecture.experts is None:
        assert all((each.branch is not None) == share_prompts for each in mini_batch.micro_batches)
    current = learner.statistics(policy, mini_batch, replace(learner.method.needs, entropy=True))
    # as if the policy had moved since it sampled: ratios on both sides of the clip range
    rollouts = replace(learner.rollout_batch(own, current, None), old_logprob=moved(current.logprob, own))
    batch = learner.batch(rollouts, learner.method.compute_advantages(rollouts, learner.reduce))
    metrics, _ = learner.gradients(batch, current, mini_batch)
    optimizer.prepare_grads()
    metrics["grad/norm"] = float(optimizer.get_grad_norm())
    return metrics, dict(hf_weights.stream(policy, gathered_gradients(policy)))


def moved(logprob: Tensor, episodes: list) -> Tensor:
    """Old log-probs that differ from the current ones by -.47 to .53, by a rule that knows no layout.

    No difference is 0, the kink of ``|logp - logp_old|`` (there rounding alone decides the gradient's sign), and none
    is within .006 of a bound at which a ratio or a value is clipped.
    """
    shift = [
        ((7 * t + 3 * e.group + len(e.sample.response_ids)) % 11 - 5) / 10 + 0.03
        for e in episodes
        for t in range(len(e.sample.response_ids))
    ]
    return logprob + torch.tensor(shift)


def gathered_gradients(policy: build.Policy) -> list[dict[str, Tensor]]:
    """Megatron leaves each data-parallel rank one shard of the summed gradient: put them together, module by module."""
    for chunk in policy.chunks:
        for buffers, group in (
            (chunk.buffers, parallel.groups.data_context()),
            (chunk.expert_parallel_buffers, parallel.groups.expert_data()),
        ):
            for bucket in [bucket for buffer in buffers for bucket in buffer.buckets]:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                parts = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(parts, shard, group=group)
                bucket.grad_data.copy_(torch.cat(parts))
    return [{name: vars(p)["main_grad"] for name, p in module.named_parameters()} for module in policy.modules]


def reference(nucleus: str, kind: str = "qwen2", tied: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Dr.GRPO + coef (Hbar - anchor)^2 in fp64, sequence by sequence, as the paper writes it."""
    hf, _ = tiny.hf_model(kind, tied)
    model = copy.deepcopy(hf).double()
    model.set_experts_implementation("eager")  # the others know no fp64
    episodes = tiny.episodes()
    rewards = torch.tensor([e.reward.value for e in episodes], dtype=torch.float64)
    policy_loss, selected = torch.zeros((), dtype=torch.float64), []
    for index, episode in enumerate(episodes):
        prompt, response = episode.sample.prompt_ids, torch.tensor(episode.sample.response_ids)
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp = logits.log_softmax(-1)
        own = logp.gather(1, response[:, None])[:, 0]
        advantage = rewards[index] - rewards[index // 4 * 4 : index // 4 * 4 + 4].mean()
        ratio = (own - moved(own.detach(), [episode])).exp()
        policy_loss = policy_loss + torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28)).sum()
        entropies = torch.stack([nucleus_entropy(row, SIREN["p"], nucleus) for row in logp])
        mask = entropies > torch.quantile(entropies.detach(), SIREN["tau"])
        selected.append((entropies * mask).sum() / mask.sum().clamp(min=1))
    policy_loss = policy_loss / len(episodes) / 12
    (policy_loss + SIREN["coef"] * (torch.stack(selected).mean() - ANCHOR) ** 2).backward()
    return float(policy_loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def nucleus_entropy(logp: Tensor, p: float, mapping: str) -> Tensor:
    order = logp.argsort(descending=True)
    before = logp[order].exp().cumsum(0) - logp[order].exp()
    kept = before < p
    if mapping == "exclusive":
        kept[int(kept.sum()) - 1] = False
    inside = logp[order[kept]]
    if len(inside) == 0:
        return logp.sum() * 0
    q = inside.log_softmax(0)
    return -(q.exp() * q).sum()


def worst(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of any tensor, relative to that tensor's norm."""
    assert set(gradients) == set(expected)
    return max(
        float((gradients[name].double() - value.double()).norm() / value.double().norm())
        for name, value in expected.items()
    )


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradients.values()]).norm())


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, Tensor]]:
    return reference("inclusive")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_gradient_of_the_formula(layout: tuple, expected: tuple) -> None:
    loss, gradients = expected
    tensor, pipeline, data, _, _ = layout
    _, path = tiny.hf_model()
    for metrics, found in gloo.run(one_step, tensor * pipeline * data, str(path), layout, SIREN):
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad/norm"] == pytest.approx(norm(gradients), rel=1e-5)
        assert worst(found, gradients) < 1e-5


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[6], LAYOUTS[7]], ids=str)
def test_prompts_that_are_not_shared_give_the_gradient_of_the_formula(layout: tuple, expected: tuple) -> None:
    tensor, pipeline, data, _, _ = layout
    _, path = tiny.hf_model()
    alone = partial(one_step, share_prompts=False)
    for metrics, found in gloo.run(alone, tensor * pipeline * data, str(path), layout, SIREN):
        assert metrics["loss/policy"] == pytest.approx(expected[0], rel=1e-5)
        assert worst(found, expected[1]) < 1e-5


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[6], LAYOUTS[7]], ids=str)
def test_the_fused_head_gives_the_gradient_of_the_formula(layout: tuple, expected: tuple) -> None:
    tensor, pipeline, data, _, _ = layout
    _, path = tiny.hf_model()
    for metrics, found in gloo.run(one_step, tensor * pipeline * data, str(path), layout, SIREN, False, True):
        assert metrics["loss/policy"] == pytest.approx(expected[0], rel=1e-5)
        assert worst(found, expected[1]) < 1e-5


def test_the_authors_nucleus_gives_the_gradient_of_the_formula() -> None:
    _, path = tiny.hf_model()
    loss, gradients = reference("exclusive")
    for metrics, found in gloo.run(one_step, 2, str(path), LAYOUTS[2], {**SIREN, "nucleus": "exclusive"}):
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert worst(found, gradients) < 1e-5


def test_a_mean_per_micro_batch_is_seen(expected: tuple) -> None:
    _, path = tiny.hf_model()
    [(_, found)] = gloo.run(one_step, 1, str(path), LAYOUTS[1], {**SIREN, "scope": "micro_batch"})
    assert worst(found, expected[1]) > 1e-2


def test_a_missing_all_reduce_is_seen(expected: tuple) -> None:
    _, path = tiny.hf_model()
    for _, found in gloo.run(one_step, 2, str(path), LAYOUTS[5], SIREN, True):
        assert worst(found, expected[1]) > 1e-2


def test_micro_batch_scope_equals_mini_batch_scope_on_one_micro_batch(expected: tuple) -> None:
    _, path = tiny.hf_model()
    [(_, found)] = gloo.run(one_step, 1, str(path), LAYOUTS[0], {**SIREN, "scope": "micro_batch"})
    assert worst(found, expected[1]) < 1e-5


def test_no_micro_batch_needs_statistics_nobody_asked_for() -> None:
    assert methods.create({"name": "grpo"}).needs == Needs()

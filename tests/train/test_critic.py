"""One PPO step: the same losses and gradients of policy, critic and value head under every layout and split.

The reference is the formula in fp64 autograd on the transformers model, with the value head on its last hidden state.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.checkpoint.checkpoint import Checkpoints
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import Config, CriticConfig, OptimizerConfig, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.model import architectures, build, hf_weights, parallel
from megatron_ext.model.critic import build_critic
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel, TrainingError
from megatron_ext.train import critic
from megatron_ext.train.packing import MiniBatch
from megatron_ext.train.step import Learner
from megatron_ext.types import Batch, TokenStats
from tests import gloo, tiny
from tests.train.test_invariance import TEMPERATURE, gathered_gradients, moved, worst

GAMMA, LAM, VALUE_CLIP = 0.9, 0.8, 0.25
PPO = {"name": "ppo", "gamma": GAMMA, "lam": LAM, "value_clip": VALUE_CLIP}
DENSE, TIED, EXPERTS = ("qwen2", False), ("qwen2", True), ("qwen3_moe", False)  # kind of model, tied embeddings
CASES: dict[str, tuple[dict[str, Any], int, tuple[str, bool]]] = {  # layout, budget of a micro-batch, model
    "one rank": ({"ranks_per_node": 1}, 23, DENSE),
    "TP 2": ({"ranks_per_node": 2, "tensor": 2}, 60, DENSE),
    "PP 2, tied": ({"ranks_per_node": 2, "pipeline": 2}, 50, TIED),
    "PP 2": ({"ranks_per_node": 2, "pipeline": 2}, 50, DENSE),
    "DP 2": ({"ranks_per_node": 2}, 40, DENSE),
    "TP 2 with SP, tied": ({"ranks_per_node": 2, "tensor": 2, "sequence": True}, 60, TIED),
    "TP 2 with SP, PP 2": ({"ranks_per_node": 4, "tensor": 2, "pipeline": 2, "sequence": True}, 45, DENSE),
    "PP 2 x 2 stages": ({"ranks_per_node": 2, "pipeline": 2, "virtual": 2}, 50, DENSE),
    "EP 2": ({"ranks_per_node": 2, "expert": 2}, 60, EXPERTS),
    "CP 2": ({"ranks_per_node": 2, "context": 2}, 50, DENSE),
}


def head() -> tuple[Tensor, Tensor]:
    """Weight ``[1, 32]`` and bias of a value head that is not zero: behind a zero head nothing has a gradient."""
    draw = torch.Generator().manual_seed(7)
    return torch.randn(1, 32, generator=draw) / 8, torch.tensor([0.3])


def launch(function: Callable[..., Any], case: str, *args: Any) -> list[Any]:
    """``function(rank, world, case, path of the model, *args)`` on the ranks of the case."""
    layout, _, (kind, tied) = CASES[case]
    return gloo.run(function, layout["ranks_per_node"], case, str(tiny.hf_model(kind, tied)[1]), *args)


def learner_of(case: str, path: str) -> Learner:
    """A learner with a critic whose head is ``head()``, with the tiny model's weights."""
    layout, budget, _ = CASES[case]
    cpu_compat.enter()
    config = Config(
        parallel=ParallelConfig(**layout),
        rollout=RolloutConfig(prompts=4, samples=4, temperature=TEMPERATURE, max_response_tokens=12),
        train=TrainConfig(mini_batch_prompts=4, micro_batch_tokens=budget, max_bad_steps=2),
    )
    parallel.initialize(config.parallel)
    spread, options = parallel.model_layout(config.parallel), ModelOptions(torch.float32)
    architecture = architectures.read_architecture(read_hf_config(path))

    def fill(modules: list) -> None:
        for module in modules:
            hf_weights.load_weights(module, architecture, path)

    policy = build.build_policy(architecture, spread, options)
    value_model = build_critic(architecture, spread, options, fill=fill)
    fill(policy.modules)
    if parallel.groups.is_last_stage():
        own: Any = value_model.modules[-1].output_layer
        assert not own.weight.any() and not own.bias.any()
        own.weight.data, own.bias.data = own.weight.data.copy_(head()[0]), own.bias.data.copy_(head()[1])
    actor = TrainableModel.build(policy, OptimizerConfig(lr=1e-3))
    return Learner(
        config, methods.create(PPO), actor, TrainableModel.build(value_model, CriticConfig(lr=1e-3), "critic")
    )


def one_mini_batch(learner: Learner) -> tuple[Batch, TokenStats, MiniBatch]:
    """This rank's episodes as if both models had moved since they saw them: on both sides of either clip range."""
    share = len(tiny.episodes()) // learner.config.parallel.data
    own = tiny.episodes()[parallel.groups.data().rank() * share :][:share]
    [mini_batch] = learner.packer.pack([own])
    assert learner.critic is not None
    current = learner.statistics(learner.policy, mini_batch, learner.method.needs)
    value = critic.values(learner.critic, mini_batch)
    old = replace(current, logprob=moved(current.logprob, own))
    rollouts = learner.rollout_batch(own, old, None, moved(value, own))
    advantages = learner.method.compute_advantages(rollouts, learner.reduce)
    return learner.batch(rollouts, advantages), current, mini_batch


def one_step(rank: int, world: int, case: str, path: str) -> Any:
    """Metrics of policy and critic, and the whole gradients of policy, critic's body and value head."""
    learner = learner_of(case, path)
    batch, current, mini_batch = one_mini_batch(learner)
    metrics, _ = learner.gradients(batch, current, mini_batch)
    assert learner.critic is not None
    metrics |= critic.gradients(learner.critic, learner.method, batch, mini_batch, learner.reduce)
    architecture = learner.policy.architecture
    policy = dict(hf_weights.stream(learner.policy, gathered_gradients(learner.policy)))
    local = gathered_gradients(learner.critic.model)
    value_head = {name: x.clone() for name, x in local[-1].items() if name.startswith("output_layer")}
    assert len(value_head) == 2 * parallel.groups.is_last_stage()
    headless = replace(learner.critic.model, architecture=replace(architecture, tied=True))
    body = dict(hf_weights.stream(headless, local))
    return metrics, policy, body, value_head


@functools.cache
def reference(
    kind: str, tied: bool
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """PPO in fp64, response by response: GAE, whitening over all tokens, both clipped losses."""
    hf, _ = tiny.hf_model(kind, tied)
    policy, body = copy.deepcopy(hf).double(), copy.deepcopy(hf).double()
    for model in (policy, body):
        model.set_experts_implementation("eager")  # the grouped one knows no fp64
    weight, bias = (x.double().requires_grad_() for x in head())
    ratios, values, old_values, estimates = [], [], [], []
    for episode in tiny.episodes():
        prompt, response = episode.sample.prompt_ids, torch.tensor(episode.sample.response_ids)
        tokens = torch.tensor([[*prompt, *response]])
        logp = (policy(tokens).logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        own = logp.gather(1, response[:, None])[:, 0]
        ratios.append((own - moved(own.detach(), [episode])).exp())
        value = (body.model(tokens).last_hidden_state[0, len(prompt) - 1 : -1] @ weight.T + bias)[:, 0]
        old = moved(value.detach(), [episode]).tolist()
        n = len(old)
        delta = [GAMMA * old[t + 1] - old[t] for t in range(n - 1)] + [episode.reward.value - old[-1]]
        estimates += [sum((GAMMA * LAM) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        old_values += old
        values.append(value)
    ratio, value = torch.cat(ratios), torch.cat(values)
    estimate, old_value = (torch.tensor(x, dtype=torch.float64) for x in (estimates, old_values))
    advantage = (estimate - estimate.mean()) / torch.sqrt(estimate.var() + 1e-8)
    policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28)).mean()
    returns = estimate + old_value
    near = old_value + (value - old_value).clamp(-VALUE_CLIP, VALUE_CLIP)
    far = (value - returns) ** 2
    value_loss = 0.5 * torch.max(far, (near - returns) ** 2).mean()
    stopped = float(((near - returns) ** 2 > far).double().mean())
    assert 0.1 < stopped < 0.9
    (policy_loss + value_loss).backward()
    of_policy, of_body = gradients(policy), gradients(body)
    assert weight.grad is not None and bias.grad is not None
    metrics = {"loss/policy": float(policy_loss), "loss/value": float(value_loss), "critic/clipped": stopped}
    return metrics, of_policy, of_body, {"output_layer.weight": weight.grad, "output_layer.bias": bias.grad}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """By the names of the model's files, which hold expert by expert what transformers stacks."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if ".experts." not in name:
            found[name] = parameter.grad
            continue
        prefix, kind = name.rsplit(".", 1)
        for number, whole in enumerate(parameter.grad):
            split = {"gate_proj": whole.chunk(2)[0], "up_proj": whole.chunk(2)[1]}
            parts = split if kind == "gate_up_proj" else {kind: whole}
            found |= {f"{prefix}.{number}.{part}.weight": value for part, value in parts.items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_gradients_of_the_formula(case: str) -> None:
    layout, _, model = CASES[case]
    losses, policy, body, value_head = reference(*model)
    heads = 0
    for metrics, found, found_body, found_head in launch(one_step, case):
        assert {name: metrics[name] for name in losses} == pytest.approx(losses, rel=1e-5)
        assert worst(found, policy) < 1e-5
        assert worst(found_body, body) < 1e-5
        if found_head:
            assert worst(found_head, value_head) < 1e-5
            heads += 1
    assert heads == layout["ranks_per_node"] // layout.get("pipeline", 1)


def update_critic(learner: Learner) -> list[float]:
    """One update; the values of all episodes after it."""
    assert learner.critic is not None
    batch, _, mini_batch = one_mini_batch(learner)
    critic.gradients(learner.critic, learner.method, batch, mini_batch, learner.reduce)
    learner.critic.update(1)
    return learner.reduce.concat(critic.values(learner.critic, mini_batch)).tolist()


def checkpoints_of(learner: Learner, root: Path) -> Checkpoints:
    layout = learner.config.parallel.model_dump()
    return Checkpoints(root, trained=learner.trained, config={}, layout=layout, keep=1, asynchronous=False)


def saves(rank: int, world: int, case: str, path: str, root: Path) -> tuple[list[float], list[float]]:
    learner = learner_of(case, path)
    update_critic(learner)
    checkpoints = checkpoints_of(learner, root)
    checkpoints.save(1, {})
    assert checkpoints.publish(wait=True) is not None
    return update_critic(learner), update_critic(learner)


def resumes(rank: int, world: int, case: str, path: str, root: Path) -> tuple[list[float], list[float]]:
    learner = learner_of(case, path)
    assert learner.critic is not None
    for parameter in learner.critic.model.modules[0].parameters():
        parameter.data.zero_()
    assert checkpoints_of(learner, root).load() is not None
    return update_critic(learner), update_critic(learner)


def test_a_critic_saved_under_one_layout_trains_on_under_another(tmp_path: Path) -> None:
    first, second = launch(saves, "TP 2", tmp_path)[0]
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1e-3
    for case in ("DP 2", "PP 2"):
        for found in launch(resumes, case, tmp_path):
            assert found == (pytest.approx(first, abs=1e-5), pytest.approx(second, abs=1e-5))


def broken_gradient(rank: int, world: int, case: str, path: str) -> None:
    """A NaN in the critic's gradient of one rank: every rank leaves that update out, the second in a row ends it."""
    learner = learner_of(case, path)
    model = learner.critic
    assert model is not None
    before = [p.clone() for p in model.model.modules[0].parameters()]

    def update(value: float) -> float:
        model.zero_grad()
        for name, parameter in model.model.modules[0].named_parameters():
            vars(parameter)["main_grad"].fill_(value if rank == 1 and name == "output_layer.bias" else 0.1)
        for chunk in model.model.chunks:
            chunk.finish_grad_sync()
        return model.update(max_bad_steps=2)[0]

    assert math.isnan(update(math.nan)) and model.bad_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.model.modules[0].parameters(), strict=True))
    assert update(0.1) > 0 and model.bad_steps == 0
    model.model.finish_param_sync()
    assert not torch.equal(before[0], next(model.model.modules[0].parameters()))
    update(math.inf)
    with pytest.raises(TrainingError, match=r"2 updates in a row .* lower critic\.lr"):
        update(math.nan)


def test_a_gradient_that_is_not_finite_is_left_out_on_every_rank() -> None:
    launch(broken_gradient, "DP 2")

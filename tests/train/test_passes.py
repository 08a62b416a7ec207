"""A step runs the policy as often as its method needs, and a pass left out changes no gradient and no metric."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import (
    AlarmsConfig,
    Config,
    ImportanceConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_ext.methods.base import Needs
from megatron_ext.metrics.display import Watch
from megatron_ext.model import architectures, build, forward, hf_weights, parallel
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.rollout.rewards.worker_pool import VerifierError
from megatron_ext.train import packing
from megatron_ext.train.mini_batches import Packer
from megatron_ext.train.mismatch import MismatchError
from megatron_ext.train.step import Learner
from megatron_ext.types import Episode, Problem, Reward, Sample
from tests import gloo, tiny
from tests.train.test_invariance import gathered_gradients, worst

BONUS = {"name": "entropy_bonus", "coef": 0.3}
SIREN = {"name": "siren", "coef": 0.7}
LAYOUTS: list[dict[str, Any]] = [
    *({}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"ranks_per_node": 2}, {"context": 2})
]
ONCE = (
    *("grpo", "dr_grpo", "clip_higher", "nsr", "psr", "w_reinforce", "entropy_bonus", "entropy_advantage"),
    *("ce_gppo", "qae"),
)
CASES = [
    *(({"name": name}, {}) for name in ONCE),
    ({"name": "grpo", "beta": 0.2}, {"pipeline": 2}),
    ({"name": "entropic", "scope": "micro_batch"}, {"ranks_per_node": 2}),
    *((BONUS, layout) for layout in LAYOUTS),
]


def world_of(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(name, 1) for name in ("tensor", "pipeline", "context", "ranks_per_node"))


def learner_of(path: str, world: int, method: dict, layout: dict, mini_batch: int = 4, **sections: Any) -> Learner:
    """On this rank, with the tiny model's weights and its engine's made-up log-probs let pass."""
    cpu_compat.enter()
    spread = ParallelConfig(**{**layout, "ranks_per_node": world})
    options: dict[str, Any] = {"alarms": AlarmsConfig(mismatch=0)} | sections
    options.setdefault("train", TrainConfig(mini_batch_prompts=mini_batch, micro_batch_tokens=30))
    config = Config(
        parallel=spread,
        rollout=RolloutConfig(prompts=4, samples=4, temperature=0.8, max_response_tokens=12),
        method=method,
        **options,
    )
    parallel.initialize(spread)
    architecture = architectures.read_architecture(read_hf_config(path))
    model_layout, model_options = parallel.model_layout(spread), ModelOptions(torch.float32)
    policy = build.build_policy(architecture, model_layout, model_options)
    frozen = build.build_reference(architecture, model_layout, model_options)
    for module in policy.modules + frozen.modules:
        hf_weights.load_weights(module, architecture, path)
    for module in frozen.modules:
        for parameter in module.parameters():
            parameter.data *= 0.9
    created = methods.create(method)
    reference = Reference(frozen, device=cpu_compat.device(), offload=False) if created.needs.reference else None
    return Learner(config, created, TrainableModel.build(policy, OptimizerConfig(lr=1e-3)), None, reference)


def counted(learner: Learner, *, standing: bool = False) -> tuple[dict[str, float], Any, list[tuple[bool, bool]]]:
    """One step's metrics, its old statistics, and of each pass of the policy whether it has a gradient and a nucleus.

    ``standing``: the weights stay and the gradients are left in the buffers.
    """
    passes: list[tuple[bool, bool]] = []
    module: Any = forward
    real = module._statistics

    def statistics(policy: Any, needs: Needs, temperature: float, *, with_grad: bool) -> Any:
        if policy is learner.policy:
            passes.append((with_grad, needs.nucleus_p is not None))
        return real(policy, needs, temperature, with_grad=with_grad)

    module._statistics = statistics
    if standing:
        learner.actor.update = lambda max_bad_steps: (1.0, 0.0)  # type: ignore[method-assign]
    data = parallel.groups.data()
    own = [each for each in tiny.episodes() if each.group % data.size() == data.rank()]
    metrics, old = learner.step(own, Watch(1, show=False))
    module._statistics = real
    return metrics, old, passes


class Asking(Learner):
    """A learner that always runs the pass before the update."""

    update_measures_old = False  # type: ignore[assignment]


def both_ways(rank: int, world: int, path: str, method: dict, layout: dict) -> list[tuple]:
    """Metrics, old log-probs, passes and gradients of a step of one update: with the pass before it, and without."""
    learner = learner_of(path, world, method, layout)
    state, found = learner.method.state_dict(), []
    for kind in (Asking, Learner):
        learner.method.load_state_dict(dict(state))
        each = kind(learner.config, learner.method, learner.actor, None, learner.reference)
        metrics, old, passes = counted(each, standing=True)
        gradients = dict(hf_weights.stream(learner.policy, gathered_gradients(learner.policy)))
        found.append((metrics, old.present(), passes, gradients))
    return found


@pytest.mark.parametrize(("method", "layout"), CASES, ids=str)
def test_one_update_a_step_needs_no_pass_before_it(method: dict, layout: dict) -> None:
    world = world_of(layout)
    for with_pass, without in gloo.run(both_ways, world, str(tiny.hf_model()[1]), method, layout):
        (expected, old, both, gradients), (metrics, seen, alone, own) = with_pass, without
        assert (both, alone) == ([(False, False), (True, False)], [(True, False)])
        assert metrics.keys() == expected.keys() and metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert seen.keys() == old.keys() == {"logprob", "entropy"}
        assert all(torch.allclose(seen[name], value, rtol=1e-6, atol=1e-6) for name, value in old.items())
        assert worst(own, gradients) < 1e-6 and any(gradient.any() for gradient in gradients.values())


def test_all_methods_that_ask_for_nothing_before_the_update_are_here() -> None:
    needs = {name: methods.create({"name": name}).needs for name in methods.METHODS}
    assert set(ONCE) == {name for name, own in needs.items() if not (own.old or own.current or own.value)}


def passes_of(
    rank: int, world: int, path: str, method: dict, mini_batch: int, sections: dict
) -> list[tuple[bool, bool]]:
    """On each of ``world`` data-parallel ranks."""
    learner = learner_of(path, world, method, {}, mini_batch, **sections)
    return counted(learner)[2]


WIDE = TrainConfig(mini_batch_prompts=2, micro_batch_tokens=1000)  # a mini-batch is one micro-batch
FORWARD, NUCLEUS_FORWARD, UPDATE, NUCLEUS_UPDATE = (False, False), (False, True), (True, False), (True, True)


@pytest.mark.parametrize(
    ("method", "mini_batch", "sections", "expected"),
    [
        ({"name": "grpo"}, 4, {}, [UPDATE]),
        ({"name": "grpo"}, 2, {}, [FORWARD, UPDATE, UPDATE]),
        ({"name": "grpo"}, 1, {}, [FORWARD, FORWARD, FORWARD, UPDATE, UPDATE, UPDATE, UPDATE]),
        ({"name": "grpo"}, 4, {"importance": ImportanceConfig(mode="truncate")}, [FORWARD, UPDATE]),
        ({"name": "grpo"}, 4, {"log": LogConfig(nucleus=True)}, [NUCLEUS_UPDATE]),
        ({"name": "grpo"}, 2, {"log": LogConfig(nucleus=True)}, [NUCLEUS_FORWARD, NUCLEUS_UPDATE, UPDATE]),
        ({"name": "aec"}, 4, {}, [FORWARD, UPDATE]),
        ({"name": "forking_tokens"}, 4, {}, [FORWARD, UPDATE]),
        (SIREN, 4, {}, [NUCLEUS_FORWARD, NUCLEUS_UPDATE]),
        (SIREN, 2, {}, [NUCLEUS_FORWARD, NUCLEUS_FORWARD, NUCLEUS_UPDATE, NUCLEUS_FORWARD, NUCLEUS_UPDATE]),
        (SIREN, 2, {"train": WIDE}, [NUCLEUS_FORWARD, NUCLEUS_UPDATE, NUCLEUS_UPDATE]),
        (
            {"name": "grpo"},
            1,
            {"train": WIDE.model_copy(update={"mini_batch_prompts": 1})},
            [FORWARD, UPDATE, UPDATE, UPDATE, UPDATE],
        ),
        ({**SIREN, "scope": "micro_batch"}, 2, {}, [NUCLEUS_FORWARD, NUCLEUS_FORWARD, NUCLEUS_UPDATE, NUCLEUS_UPDATE]),
    ],
    ids=str,
)
def test_every_pass_is_needed(method: dict, mini_batch: int, sections: dict, expected: list) -> None:
    assert gloo.run(passes_of, 1, str(tiny.hf_model()[1]), method, mini_batch, sections) == [expected]


def stepped(
    rank: int, world: int, path: str, method: dict, layout: dict, other: type[Learner], sections: dict
) -> list[tuple]:
    """Metrics, old log-probs, passes and weights of a step of two updates, by the ``other`` learner and the usual."""
    found = []
    for kind in (other, Learner):
        learner = learner_of(path, world, method, layout, 2, **sections)
        each = kind(learner.config, learner.method, learner.actor, None, learner.reference)
        metrics, old, passes = counted(each)
        learner.policy.finish_param_sync()
        weights = {name: value.clone() for name, value in hf_weights.PolicyWeights(learner.policy)}
        found.append((metrics, old.present(), passes, weights))
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(("method", "layout"), CASES, ids=str)
def test_the_first_of_two_updates_measures_its_mini_batch_itself(method: dict, layout: dict) -> None:
    path = str(tiny.hf_model()[1])
    for with_pass, without in gloo.run(stepped, world_of(layout), path, method, layout, Asking, {}):
        (expected, old, both, weights), (metrics, seen, alone, own) = with_pass, without
        assert (len(both), len(alone)) == (4, 3) and [grad for grad, _ in alone] == [False, True, True]
        assert metrics.keys() == expected.keys() and metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert seen.keys() == old.keys() == {"logprob", "entropy"}
        assert all(torch.allclose(seen[name], value, rtol=1e-6, atol=1e-6) for name, value in old.items())
        assert worst(own, weights) < 1e-6


def left_alone(rank: int, world: int, path: str) -> tuple[list[tuple[bool, bool]], int, bool]:
    """Of a step whose method leaves the policy alone: passes, tokens with old log-probs, whether a weight moved."""
    learner = learner_of(path, world, {"name": "grpo"}, {}, 2)
    kind: Any = type(learner.method)
    learner.method = type("Resting", (kind,), {"updates_policy": False})()
    before = [p.detach().clone() for module in learner.policy.modules for p in module.parameters()]
    metrics, old, passes = counted(learner)
    after: list[Tensor] = [p for module in learner.policy.modules for p in module.parameters()]
    assert metrics["entropy/full"] > 0 and not old.logprob.isnan().any()
    return passes, len(old.logprob), not all(map(torch.equal, before, after))


def test_a_step_that_leaves_the_policy_alone_measures_it_all_the_same() -> None:
    num_tokens = sum(len(each.sample.response_ids) for each in tiny.episodes())
    assert gloo.run(left_alone, 1, str(tiny.hf_model()[1])) == [([(False, False)] * 2, num_tokens, False)]


class Separate(Learner):
    """A learner whose moved policy is always measured by a pass of its own."""

    def is_one_pass(self, mini_batch: Any) -> bool:
        return False


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence": True}, {"ranks_per_node": 2}], ids=str)
@pytest.mark.parametrize("name", [name for name in methods.METHODS if methods.create({"name": name}).needs.current])
def test_an_update_in_one_micro_batch_measures_the_moved_policy_itself(name: str, layout: dict) -> None:
    path = str(tiny.hf_model()[1])
    for separate, alone in gloo.run(stepped, world_of(layout), path, {"name": name}, layout, Separate, {"train": WIDE}):
        (expected, _, more, weights), (metrics, _, passes, own) = separate, alone
        assert len(passes) == len(more) - 1
        assert metrics.keys() == expected.keys() and metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert all(torch.equal(own[name], value) for name, value in weights.items())


class PackerApart(Packer):
    def joined_neighbours(self, parts: Any, mini_batches: list[Any]) -> list[Any]:
        return mini_batches


class Apart(Learner):
    """A learner whose mini-batches are measured one by one."""

    @property
    def packer(self) -> PackerApart:
        return PackerApart(self.config, self.policy)


@pytest.mark.parametrize("method", [SIREN, {"name": "grpo", "beta": 0.2}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mini_batches_that_one_micro_batch_holds_are_measured_in_one_pass(method: dict, layout: dict) -> None:
    path, prompts = str(tiny.hf_model()[1]), 2 if "ranks_per_node" in layout else 1
    wide = WIDE.model_copy(update={"mini_batch_prompts": prompts})
    for apart, joint in gloo.run(stepped, world_of(layout), path, method, layout, Apart, {"train": wide}):
        (expected, old, more, weights), (metrics, seen, passes, own) = apart, joint
        measured = 4 // prompts - (method is not SIREN)  # GRPO's first update measures its own
        assert len(passes) == len(more) - measured + 1
        assert metrics.keys() == expected.keys() and metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert all(torch.allclose(seen[name], value, rtol=1e-6, atol=1e-6) for name, value in old.items())
        assert worst(own, weights) < 1e-5  # a hundredth of an update: Adam divides small gradients by themselves


class Rounding(Learner):
    """A learner whose passes without gradient round otherwise than those with one."""

    def statistics(self, policy: Any, mini_batch: Any, needs: Needs) -> Any:
        stats = super().statistics(policy, mini_batch, needs)
        entropy = None if stats.entropy is None else 1.5 * stats.entropy  # far from rounding, and yet no ratio but 1
        return replace(stats, logprob=stats.logprob + 1e-6, entropy=entropy)


def moves_of(rank: int, world: int, path: str, method: dict, layout: dict) -> list[tuple[float, float]]:
    """Of each of a step's four updates the largest change of a log-prob, and of an entropy where the method asks for
    the old one, since the step began, as its loss sees it."""
    train = WIDE.model_copy(update={"mini_batch_prompts": 1})
    base = learner_of(path, world, method, layout, train=train)
    learner = Rounding(base.config, base.method, base.actor)
    of_method, found = learner.method.loss, list[tuple[float, float]]()

    def loss(batch: Any, stats: Any, prepared: Any) -> Tensor:
        pairs = [(stats.logprob, batch.old_logprob)]
        pairs.append((stats.entropy, batch.old.entropy) if batch.old is not None else pairs[0])
        moved, changed = (float((now - old).abs().max().detach()) for now, old in pairs)
        found.append((moved, changed))
        return of_method(batch, stats, prepared)

    learner.method.loss = loss  # type: ignore[method-assign]
    assert len(counted(learner)[2]) == 5
    return found


@pytest.mark.parametrize("method", [{"name": "kl_cov"}, {"name": "erc"}, {"name": "grpo"}], ids=str)
@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence": True}, {"context": 2}], ids=str)
def test_the_first_update_finds_everything_where_it_was(method: dict, layout: dict) -> None:
    """To the bit, though its mini-batch was measured in another pass: KL-Cov's |log r| has a gradient of 1 where log r
    is anything but 0, and ERC stops tokens whose entropy has moved."""
    for first, *rest in gloo.run(moves_of, world_of(layout), str(tiny.hf_model()[1]), method, layout):
        assert first == (0, 0) and all(min(moved) > 1e-4 for moved in rest)


@pytest.mark.parametrize(("budget", "forwards"), [(60, 2), (71, 1)])
def test_mini_batches_that_one_rank_cannot_hold_together_are_measured_one_by_one_on_all(
    budget: int, forwards: int
) -> None:
    """Rank 0's two mini-batches have 32 and 35 tokens, those of rank 1 have 36 and 21."""
    sections = {"train": TrainConfig(mini_batch_prompts=2, micro_batch_tokens=budget)}
    found = gloo.run(passes_of, 2, str(tiny.hf_model()[1]), SIREN, 2, sections)
    assert found == [[NUCLEUS_FORWARD] * forwards + [NUCLEUS_UPDATE] * 2] * 2


def refused(rank: int, world: int, path: str) -> tuple[bool, bool]:
    """Whether an engine that samples from other weights stops the step, and whether the weights had moved by then."""
    learner = learner_of(path, world, {"name": "grpo"}, {}, alarms=AlarmsConfig(mismatch=0.2))
    before = [p.detach().clone() for module in learner.policy.modules for p in module.parameters()]
    try:
        counted(learner)
    except MismatchError:
        after: list[Tensor] = [p for module in learner.policy.modules for p in module.parameters()]
        return True, not all(map(torch.equal, before, after))
    return False, True


def test_another_policy_is_refused_before_the_only_update() -> None:
    assert gloo.run(refused, 1, str(tiny.hf_model()[1])) == [(True, False)]


def without_verdicts(rank: int, world: int, path: str) -> tuple[str, bool]:
    """What a step says most of whose answers have no verdict, and whether the weights had moved by then."""
    learner = learner_of(path, world, {"name": "grpo"}, {})
    learner.config = learner.config.model_copy(update={"rollout": RolloutConfig(prompts=4, samples=5)})
    before = [p.detach().clone() for module in learner.policy.modules for p in module.parameters()]
    episodes = [
        replace(e, reward=Reward(0.0, ("error", "timeout", "wrong")[i % 3])) for i, e in enumerate(tiny.episodes())
    ]
    try:
        learner.step(episodes, Watch(1, title="", show=False))
    except VerifierError as error:
        after: list[Tensor] = [p for module in learner.policy.modules for p in module.parameters()]
        return str(error), not all(map(torch.equal, before, after))
    return "", False


def test_answers_without_a_verdict_are_counted_over_all_ranks_before_the_first_update() -> None:
    """A rank of a large run has fewer than the twenty of which its pool can tell."""
    [(message, moved)] = gloo.run(without_verdicts, 1, str(tiny.hf_model()[1]))
    assert re.match(r"reward: 6\d\.\d% of the step's 20 responses have no verdict \(timeout .*, error .*\)", message)
    assert not moved


def micro_batches_of(rank: int, world: int, path: str) -> int:
    """Rank 0 has one tree, which fills a micro-batch, and without sharing four; rank 1 has two sequences."""
    learner = learner_of(path, world, BONUS, {}, train=TrainConfig(mini_batch_prompts=4, micro_batch_tokens=22))
    lengths = [(10, 4)] * 4 if rank == 0 else [(11, 12)] * 2
    samples = [Sample((1 + rank,) * prompt, (2,) * n, (0.0,) * n, "", False, 0) for prompt, n in lengths]
    assert len(packing.split([(s.prompt_ids, s.response_ids) for s in samples], 22, width=32)) == 1 + rank
    problem, reward = Problem("", "", ""), Reward(1.0, "correct")
    [packed] = learner.packer.pack([[Episode(problem, 0, sample, reward) for sample in samples]])
    return len(packed.micro_batches)


def test_all_ranks_have_as_many_micro_batches_also_where_sharing_prompts_is_given_up() -> None:
    assert gloo.run(micro_batches_of, 2, str(tiny.hf_model()[1])) == [4, 4]

"""Sampling replay: what was sampled is what is trained, recorded or recomputed, under every layout and split.

The reference restricts the transformers model's own distribution in fp64, by the words of the definition, and takes the
gradient of GRPO's loss with the set held constant.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext import cpu_compat, methods
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.loading import with_defaults
from megatron_ext.config.schema import AlarmsConfig, Config, OptimizerConfig, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.kept_tokens import KeptTokens, Restriction
from megatron_ext.metrics.display import Watch
from megatron_ext.model import architectures, build, hf_weights, parallel
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.train.step import Learner
from megatron_ext.types import Episode, Sample
from tests import gloo, tiny
from tests.rollout.test_hf import left
from tests.train import whole_run
from tests.train.test_invariance import gathered_gradients, moved, worst

TEMPERATURE = 0.8
RESTRICTION = Restriction(top_k=20, top_p=0.95, min_p=0.05)
GRPO = {"name": "grpo"}
LAYOUTS = [  # tensor, pipeline, sequence, budget of a micro-batch, context
    (1, 1, False, 1000, 1),
    (1, 1, False, 23, 1),
    (2, 1, False, 60, 1),
    (2, 1, True, 40, 1),
    (4, 1, False, 60, 1),
    (1, 2, False, 50, 1),
    (1, 1, False, 40, 2),
]


def sampled(restriction: Restriction = RESTRICTION) -> list[Episode]:
    """The tiny episodes' prompts, answered by the engine."""
    old = tiny.episodes()
    base = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
    _, folder = tiny.hf_model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((base / name).read_text())
    requests = [Request(e.sample.prompt_ids, seed_of(7, number)) for number, e in enumerate(old)]
    sampling = Sampling(TEMPERATURE, max_response_tokens=12, keeps_support=True, **named(restriction))
    samples = HFEngine(folder).generate(requests, sampling)
    return [replace(e, sample=sample) for e, sample in zip(old, samples, strict=True)]


def named(restriction: Restriction) -> dict[str, Any]:
    return restriction._asdict()


def forgotten(episodes: list[Episode]) -> list[Episode]:
    """As of an engine that cannot tell what it kept."""
    return [replace(e, sample=replace(e.sample, support=None)) for e in episodes]


def world_of(layout: tuple) -> int:
    tensor, pipeline, _, _, context = layout
    return tensor * pipeline * context


def learner_of(
    path: str, world: int, layout: tuple, method: dict, *, fused_head: bool = False, **rollout: Any
) -> Learner:
    tensor, pipeline, sequence, budget, context = layout
    cpu_compat.enter()
    config = Config(
        parallel=ParallelConfig(
            ranks_per_node=world, tensor=tensor, pipeline=pipeline, sequence=sequence, context=context
        ),
        rollout=RolloutConfig(
            prompts=4, samples=4, temperature=TEMPERATURE, max_response_tokens=12, **(named(RESTRICTION) | rollout)
        ),
        train=TrainConfig(mini_batch_prompts=4, micro_batch_tokens=budget),
        method=method,
        alarms=AlarmsConfig(mismatch=1e-4 if rollout.get("sampling_replay") != "off" else 0),
    )
    parallel.initialize(config.parallel)
    architecture, spread = architectures.read_architecture(read_hf_config(path)), parallel.model_layout(config.parallel)
    policy = build.build_policy(architecture, spread, ModelOptions(torch.float32), fused_head=fused_head)
    frozen = build.build_reference(architecture, spread, ModelOptions(torch.float32))
    for module in policy.modules + frozen.modules:
        hf_weights.load_weights(module, architecture, path)
    for module in frozen.modules:
        for parameter in module.parameters():
            parameter.data *= 0.9
    created = methods.create(method)
    reference = Reference(frozen, device=cpu_compat.device(), offload=False) if created.needs.reference else None
    return Learner(config, created, TrainableModel.build(policy, OptimizerConfig(lr=1e-3)), None, reference)


def one_step(rank: int, world: int, path: str, layout: tuple, episodes: list[Episode], fused_head: bool) -> Any:
    """The old log-probs of the tokens, and whole gradients of one mini-batch."""
    learner = learner_of(path, world, layout, GRPO, fused_head=fused_head)
    [mini_batch] = learner.packer.pack([episodes])
    current = learner.statistics(learner.policy, mini_batch, replace(learner.method.needs, entropy=True))
    rollouts = replace(learner.rollout_batch(episodes, current, None), old_logprob=moved(current.logprob, episodes))
    batch = learner.batch(rollouts, learner.method.compute_advantages(rollouts, learner.reduce))
    learner.gradients(batch, current, mini_batch)
    learner.actor.optimizer.prepare_grads()
    gradients = dict(hf_weights.stream(learner.policy, gathered_gradients(learner.policy)))
    return current.present(), gradients


def reference(episodes: list[Episode]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Restricted log-probs, whole entropies and sizes ``[T]``, and GRPO's gradients, in fp64."""
    model = copy.deepcopy(tiny.hf_model()[0]).double()
    rewards = torch.tensor([e.reward.value for e in episodes], dtype=torch.float64).view(-1, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    logprobs, entropies, sizes, losses = [], [], [], []
    for index, episode in enumerate(episodes):
        prompt, response = episode.sample.prompt_ids, torch.tensor(episode.sample.response_ids)
        z = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        kept = [sorted(left(row.tolist(), RESTRICTION, TEMPERATURE)) for row in z]
        inside = torch.full_like(z, -torch.inf)
        for t, ids in enumerate(kept):
            inside[t, ids] = 0.0
        own = (z / TEMPERATURE + inside).log_softmax(-1).gather(1, response[:, None])[:, 0]
        whole = (z / TEMPERATURE).log_softmax(-1)
        ratio = (own - moved(own.detach(), [episode])).exp()
        a = advantage.flatten()[index]
        losses.append(torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)))
        logprobs.append(own.detach())
        entropies.append(-(whole.exp() * whole).sum(-1).detach())
        sizes += [float(len(ids)) for ids in kept]
    torch.stack([each.mean() for each in losses]).mean().backward()
    found = {"logprob": torch.cat(logprobs), "entropy": torch.cat(entropies), "support_size": torch.tensor(sizes)}
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return sampled()


@pytest.fixture(scope="module")
def expected(episodes: list[Episode]) -> tuple:
    return reference(episodes)


@pytest.mark.parametrize("fused_head", [False, True], ids=["logits", "fused head"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_those_of_the_restricted_policy(
    layout: tuple, recorded: bool, fused_head: bool, episodes: list[Episode], expected: tuple
) -> None:
    values, gradients = expected
    own = episodes if recorded else forgotten(episodes)
    path = str(tiny.hf_model()[1])
    for stats, found in gloo.run(one_step, world_of(layout), path, layout, own, fused_head):
        for name, value in values.items():
            torch.testing.assert_close(stats[name].double(), value.double(), atol=2e-5, rtol=0)
        assert not stats["outside_support"].any()
        assert worst(found, gradients) < 1e-5


class Asking(Learner):
    """A learner that always runs the pass before the update."""

    update_measures_old = False  # type: ignore[assignment]


def both_ways(rank: int, world: int, path: str, layout: tuple, method: dict, episodes: list[Episode]) -> list[tuple]:
    """Metrics, gradients and number of the policy's passes of a step of one update: with a pass before, and without."""
    learner, found = learner_of(path, world, layout, method), []
    learner.actor.update = lambda max_bad_steps: (1.0, 0.0)  # type: ignore[method-assign]
    for kind in (Asking, Learner):
        each = kind(learner.config, learner.method, learner.actor, None, learner.reference)
        passes = spied(each)
        metrics, _ = each.step(episodes, Watch(1, show=False))
        found.append((metrics, dict(hf_weights.stream(each.policy, gathered_gradients(each.policy))), len(passes)))
    return found


def spied(learner: Learner) -> list[str]:
    """Grows by one with each pass of the policy, the update included."""
    passes: list[str] = []

    def counting(function: Callable, name: str) -> Callable:
        def counted(*args: Any, **options: Any) -> Any:
            if name == "update" or args[0] is learner.policy:
                passes.append(name)
            return function(*args, **options)

        return counted

    learner.statistics = counting(learner.statistics, "statistics")  # type: ignore[method-assign]
    learner.gradients = counting(learner.gradients, "update")  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4], LAYOUTS[6]], ids=str)
@pytest.mark.parametrize(
    ("beta", "recorded", "passes"), [(0.0, True, 1), (0.0, False, 1), (0.2, True, 1), (0.2, False, 2)], ids=str
)
def test_the_only_update_finds_what_was_kept_but_for_a_reference(
    beta: float, recorded: bool, passes: int, layout: tuple, episodes: list[Episode]
) -> None:
    own, path = episodes if recorded else forgotten(episodes), str(tiny.hf_model()[1])
    method, world = {"name": "grpo", "beta": beta}, world_of(layout)
    for (expected, gradients, _), (metrics, found, count) in gloo.run(both_ways, world, path, layout, method, own):
        assert count == passes and worst(found, gradients) < 1e-6
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert metrics["support/recorded"] == recorded and metrics["support/outside"] == 0
        assert metrics["mismatch/mean"] < 1e-5 and metrics["mismatch/ratio"] == pytest.approx(1, abs=1e-5)


def test_what_was_kept_is_joined_filled_in_and_holds_what_was_sampled() -> None:
    kept = KeptTokens.of_lists([[5, 3], [], [7, 1, 9]])
    assert (kept.ids.tolist(), kept.starts.tolist()) == ([3, 5, 1, 7, 9], [0, 2, 2, 5])
    found, missing = kept.with_targets(np.array([4, 2, 9]))
    assert (found.ids.tolist(), found.starts.tolist()) == ([3, 4, 5, 1, 7, 9], [0, 3, 3, 6])
    assert missing.tolist() == [True, False, False]
    joined = KeptTokens.join([kept, KeptTokens.empty(2)])
    other = KeptTokens.of_lists([[0], [0], [0], [8, 6], [2]])
    filled = joined.filled(other, np.array([False, False, False, True, True]))
    assert (filled.ids.tolist(), filled.starts.tolist()) == ([3, 5, 1, 7, 9, 6, 8, 2], [0, 2, 2, 5, 7, 8])


RECIPE = "grpo/grpo-tiny-cpu.toml"
RESTRICTED = ("rollout.top_p=0.95", "rollout.top_k=20", "rollout.min_p=0.05")


def test_the_engine_and_the_trainer_agree_as_without_a_restriction(tmp_path: Path) -> None:
    for name, options in (("whole", ()), ("kept", RESTRICTED), ("off", (*RESTRICTED, "rollout.sampling_replay=off"))):
        assert whole_run.train(tmp_path / name, RECIPE, *options) == 0
    whole, kept, off = (whole_run.metrics(tmp_path / name) for name in ("whole", "kept", "off"))
    for plain, replayed, without in zip(whole, kept, off, strict=True):
        assert replayed["mismatch/mean"] <= plain["mismatch/mean"] < 1e-5
        assert replayed["mismatch/ratio"] == pytest.approx(1, abs=1e-5)
        assert without["mismatch/ratio"] < 1 - 1e-3 and without["mismatch/mean"] > 1e-3
        assert 1 < replayed["support/size"] < 20 and replayed["support/recorded"] == 1
        assert replayed["support/outside"] == 0 and "support/size" not in plain | without


def spoilt(monkeypatch: pytest.MonkeyPatch, change: Callable[[Sample], Sample]) -> None:
    """Every sample of the engine is changed on its way."""
    generate = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda self, *args: list(map(change, generate(self, *args))))


def test_recorded_and_recomputed_make_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole_run.train(tmp_path / "recorded", RECIPE, *RESTRICTED) == 0
    spoilt(monkeypatch, lambda sample: replace(sample, support=None))
    assert whole_run.train(tmp_path / "recomputed", RECIPE, *RESTRICTED) == 0
    recorded, recomputed = (whole_run.metrics(tmp_path / name) for name in ("recorded", "recomputed"))
    for one, other in zip(recorded, recomputed, strict=True):
        assert (one.pop("support/recorded"), other.pop("support/recorded")) == (1, 0)
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_a_sampled_token_that_was_not_kept_is_put_there_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_first(sample: Sample) -> Sample:
        assert sample.support is not None
        (ids, starts), own = sample.support, sample.response_ids[0]
        others = [each for each in ids[: starts[1]].tolist() if each != own]
        first = KeptTokens.of_lists([others or [int(own == 0)]])
        return replace(sample, support=KeptTokens.join([first, KeptTokens(ids[starts[1] :], starts[1:] - starts[1])]))

    spoilt(monkeypatch, without_first)
    assert whole_run.train(tmp_path, RECIPE, *RESTRICTED) == 0
    for step in whole_run.metrics(tmp_path):
        assert step["support/outside"] == pytest.approx(1 / step["response/length"])
        assert step["mismatch/mean"] < 0.2 and step["grad/skipped"] == 0


def test_a_killed_run_resumes_to_the_bits_of_the_run_that_was_not(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path / "whole", RECIPE, *RESTRICTED) == 0
    whole_run.train_and_die(tmp_path / "killed", RECIPE, *RESTRICTED, after=1)
    assert whole_run.train(tmp_path / "killed", RECIPE, *RESTRICTED) == 0
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 2) == whole_run.contents(tmp_path / "whole", 2)


def test_a_run_of_before_sampling_replay_goes_on_without_it(tmp_path: Path) -> None:
    """Its checkpoint does not name the key; a nucleus was then trained on the whole policy."""
    assert whole_run.train(tmp_path, RECIPE, "rollout.top_p=0.95", "rollout.sampling_replay=off") == 0
    manifest = tmp_path / "run" / "checkpoints" / "step_000002" / "MANIFEST.json"
    saved = json.loads(manifest.read_text())["config"]
    for key in ("sampling_replay", "top_k", "min_p"):
        del saved["rollout"][key]
    assert with_defaults(saved)["rollout"]["sampling_replay"] == "off"
    assert with_defaults({"rollout": {"top_p": 1.0}})["rollout"]["sampling_replay"] == "auto"

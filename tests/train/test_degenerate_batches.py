"""Steps with little or nothing to learn from: finite, counted, and for the rest exactly what the formula gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import methods
from megatron_ext.metrics.display import Watch
from megatron_ext.model import hf_weights
from megatron_ext.types import Episode
from tests import gloo, tiny
from tests.train.test_invariance import gathered_gradients, worst
from tests.train.test_passes import learner_of

TEMPERATURE, LONGEST = 0.8, 12  # of test_passes.learner_of
DR_GRPO, SIREN = {"name": "dr_grpo"}, {"name": "siren", "coef": 0.7}
Found = tuple[dict[str, float], dict[str, Tensor]]  # metrics and whole gradients


def edited(**changes: Callable[[int, Episode], Any]) -> list[Episode]:
    """The tiny episodes, 4 groups of 4, with fields that ``change(number, episode)`` gives."""
    found = []
    for number, episode in enumerate(tiny.episodes()):
        own = {name: change(number, episode) for name, change in changes.items()}
        reward = replace(episode.reward, value=own.pop("reward", episode.reward.value))
        group = own.pop("group", episode.group)
        found.append(replace(episode, sample=replace(episode.sample, **own), group=group, reward=reward))
    return found


def keep_tokens(which: Callable[[int], bool], to: int) -> list[Episode]:
    return edited(
        response_ids=lambda n, e: e.sample.response_ids[: to if which(n) else None],
        logprobs=lambda n, e: e.sample.logprobs[: to if which(n) else None],
    )


EPISODES = {  # and what of them is counted, as a share of the 16 responses or of the groups
    "a group of one": (edited(group=lambda n, e: -1 if n == 0 else e.group), {"group/single": 1 / 5}),
    "equal rewards": (
        edited(reward=lambda n, e: 1.0 if n < 4 else float(n % 2)),
        {"group/equal_rewards": 1 / 4, "advantage/zero": 4 / 16},
    ),
    "a reward that is NaN": (
        edited(reward=lambda n, e: math.nan if n == 1 else float(n % 4 < 2)),
        {"reward/nan": 1 / 16},
    ),
    "a group of NaN": (
        edited(reward=lambda n, e: math.nan if 4 <= n < 8 else float(n % 2)),
        {"reward/nan": 4 / 16, "advantage/zero": 4 / 16},
    ),
    "an empty response": (keep_tokens(lambda n: n in (2, 9), 0), {}),
    "all responses cut": (edited(truncated=lambda n, e: True), {"response/truncated": 1.0}),
}


def one_step(rank: int, world: int, path: str, method: dict, episodes: list[Episode]) -> Found:
    """Metrics of a step, and the gradient that its one update would apply."""
    learner = learner_of(path, world, method, {})
    if method["name"] == "siren":
        learner.method.load_state_dict({"h_anchor": 0.5})
    learner.actor.update = lambda max_bad_steps: (1.0, 0.0)  # type: ignore[method-assign]
    share = len(episodes) // world
    metrics, _ = learner.step(episodes[rank * share :][:share], Watch(1, show=False))
    return metrics, dict(hf_weights.stream(learner.policy, gathered_gradients(learner.policy)))


def reference(episodes: list[Episode]) -> dict[str, Tensor]:
    """Dr.GRPO where the policy has not moved yet, response by response in fp64: those without a reward are not there,
    those without a token count in their group's mean alone."""
    model = copy.deepcopy(tiny.hf_model()[0]).double()
    scored = [each for each in episodes if not math.isnan(each.reward.value)]
    trained = [each for each in scored if each.sample.response_ids]
    loss = torch.zeros((), dtype=torch.float64)
    for episode in trained:
        prompt, response = episode.sample.prompt_ids, torch.tensor(episode.sample.response_ids)
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logprob = logits.log_softmax(-1).gather(1, response[:, None]).sum()
        group = [each.reward.value for each in scored if each.group == episode.group]
        loss = loss - (episode.reward.value - sum(group) / len(group)) * logprob / LONGEST / len(trained)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_finite(metrics: dict[str, float], gradients: dict[str, Tensor]) -> None:
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []
    assert [name for name, value in gradients.items() if not value.isfinite().all()] == []


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", EPISODES)
def test_what_can_be_learnt_is_and_the_rest_is_counted(name: str, world: int) -> None:
    episodes, counted = EPISODES[name]
    expected = reference(episodes)
    for metrics, gradients in gloo.run(one_step, world, str(tiny.hf_model()[1]), DR_GRPO, episodes):
        check_finite(metrics, gradients)
        assert worst(gradients, expected) < 1e-5
        assert {key: metrics[key] for key in counted} == pytest.approx(counted)
        assert (
            metrics["reward/nan"]
            == counted.get("reward/nan", 0)
            == sum(math.isnan(each.reward.value) for each in episodes) / len(episodes)
        )


@pytest.mark.parametrize("world", [1, 2])
def test_an_entropy_term_that_selects_no_token_adds_nothing(world: int) -> None:
    """Of one token none is above its own quantile."""
    episodes = keep_tokens(lambda n: True, 1)
    for metrics, gradients in gloo.run(one_step, world, str(tiny.hf_model()[1]), SIREN, episodes):
        check_finite(metrics, gradients)
        assert metrics["siren/selected_share"] == metrics["siren/hbar"] == 0
        assert worst(gradients, reference(episodes)) < 1e-5


@pytest.mark.parametrize("name", [n for n in methods.METHODS if not methods.create({"name": n}).needs.value])
def test_a_step_without_a_single_reward_changes_nothing(name: str) -> None:
    episodes = edited(reward=lambda n, e: math.nan)
    for metrics, gradients in gloo.run(one_step, 1, str(tiny.hf_model()[1]), {"name": name}, episodes):
        check_finite(metrics, gradients)
        assert metrics["reward/nan"] == metrics["advantage/zero"] == 1
        assert not any(gradient.any() for gradient in gradients.values())

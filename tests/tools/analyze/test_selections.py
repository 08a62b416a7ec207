"""A method's selected tokens are those that training selects from the same responses."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_ext import methods
from megatron_ext.config.loading import load_config
from megatron_ext.methods.base import Method, OneRank
from megatron_ext.records import Problem, Reward
from megatron_ext.train.step import Learner
from megatron_ext.types import Batch, Episode, Sample
from tests.tools.analyze.inputs import BASE, DATA, analyze, write_samples
from tools.analyze.batches import batch_of, create_method, groups, selections
from tools.analyze.scored import Scored, of_model

SELECTING = [name for name, cls in methods.METHODS.items() if cls.selections is not Method.selections]
OPTIONS = {  # with which something is selected among so few tokens: option=value
    "clip_cov": ["w_low=-100.0", "w_high=100.0", "r=0.2"],
    "kl_cov": ["k=0.1"],
    "sent": ["cov_ratio=0.1"],
    "dmmpt": ["tau=0.5", "sigma=9.0"],
    "lp_reg": ["rho=0.5", "kappa=0.001"],
}
CONFIG = load_config("recipes/siren/siren-tiny-cpu.toml")


def scored(tmp_path: Path, method: Method) -> list[Scored]:
    options = argparse.Namespace(data=[DATA], limit=None, temperature=1.0, dtype="float32")
    samples = write_samples(tmp_path / "samples.jsonl")
    return of_model("m", BASE, samples, options, Console(quiet=True), method.needs).responses


def trained_on(responses: list[Scored], method: Method) -> Batch:
    """The batch that the trainer makes of these responses as episodes."""
    numbers = {problem: number for number, problem in enumerate(dict.fromkeys(r.problem for r in responses))}
    episodes = [
        Episode(
            Problem(response.problem[1], "", ""),
            numbers[response.problem],
            Sample((1,), response.ids, tuple(response.logprob.tolist()), "", response.truncated, 0),
            Reward(float(bool(response.correct)), "correct" if response.correct else "wrong"),
        )
        for response in responses
    ]
    learner = Learner(CONFIG, method, actor=None, reduce=OneRank())  # pyright: ignore[reportArgumentType]
    rollouts = learner.rollout_batch(episodes, batch_of(groups(responses), method)[1], None)
    return learner.batch(rollouts, method.compute_advantages(rollouts, OneRank()))


def test_every_method_that_chooses_tokens_is_tested() -> None:
    assert {"siren", "sent", "forking_tokens", "kl_cov", "clip_cov", "high_entropy_reward", "dmmpt"} <= {*SELECTING}


@pytest.mark.parametrize("name", SELECTING)
def test_the_selection_is_that_of_training(tmp_path: Path, name: str) -> None:
    method = create_method(name, OPTIONS.get(name, []))
    responses = scored(tmp_path, method)
    ordered, masks = selections(responses, method, None)
    batch = trained_on(ordered, method)
    ours, stats = batch_of(groups(responses), method)
    assert torch.equal(ours.advantage, batch.advantage) and torch.equal(ours.sequence, batch.sequence)
    if "h_anchor" in method.state_dict():
        method.load_state_dict({"h_anchor": 0.0})  # else the first step's slope is 0 everywhere
    state = method.state_dict()
    if "updates" in state:
        method.load_state_dict(state | {"updates": -1})  # prepare counts before it selects
    prepared = method.prepare(batch, stats, OneRank()).token
    changed = {name: value for name, value in prepared.items() if name != "control"}
    chosen = torch.stack([value != 0 for value in changed.values()]).any(0).numpy()
    union = np.any(list(masks.values()), axis=0)
    assert (union == chosen).all() and chosen.any() and not chosen.all()


def test_peak_entropy_tokens_are_above_their_responses_quantile(tmp_path: Path) -> None:
    method = create_method("siren", ["p=0.9", "tau=0.6"])
    responses = scored(tmp_path, method)
    _, masks = selections(responses, method, 2)
    start = 0
    for response in responses:
        assert response.stats is not None and response.stats.nucleus_entropy is not None
        entropy = response.stats.nucleus_entropy
        end = start + len(entropy)
        assert masks["peak entropy"][start:end].tolist() == (entropy > entropy.quantile(0.6)).tolist()
        start = end


def test_the_table_counts_the_selected_tokens(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples.jsonl")
    arguments = (BASE, "--samples", samples, "--data", DATA, "--method", "forking_tokens", "--labels", "base")
    found = analyze(tmp_path / "out", "tokens", *arguments)["selections"]["forking"]
    method = create_method("forking_tokens", [])
    ordered, masks = selections(scored(tmp_path, method), method, None)
    texts = [text for response in ordered for text in response.texts]
    count = Counter(text for text, chosen in zip(texts, masks["forking"], strict=True) if chosen)
    assert {each["token"]: each["count"] for each in found["ranked"]} == dict(count)
    assert found["tokens"] == int(0.2 * len(texts)) == sum(count.values())
    assert sum(each["share"] for each in found["ranked"]) == pytest.approx(1, abs=1e-4)
    assert [each["count"] for each in found["ranked"]] == sorted(count.values(), reverse=True)

"""Ranks that wait for one another say so, by one clock."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.config.schema import Config, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.spans import WAITING, Span, busy_seconds, idle_shares
from megatron_ext.metrics.writer import MetricsWriter, read_steps, write_planner
from megatron_ext.model import parallel
from megatron_ext.plan.memory import Roles
from megatron_ext.rollout.base import Request
from megatron_ext.train.collect_rollouts import Rollouts
from megatron_ext.train.timeline import describe_run, gather, meet
from megatron_ext.types import Problem, Reward, Sample
from tests import gloo, tiny
from tests.train import whole_run
from tests.train.test_collect_rollouts import Pool
from tests.train.test_passes import learner_of
from tools.measured_run import comparison, read_measured
from tools.report.page import report

NAP = 1.0  # seconds: a busy machine is late by less


def slow_first_rank(rank: int, world: int) -> Any:
    """A step in which rank 0 works NAP longer than the others, who wait for it."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    with Watch(1, show=False) as watch:
        meet(watch)
        watch.restart()
        with watch.phase("update"):
            time.sleep(NAP * (2 if rank == 0 else 1))
            meet(watch)
        return gather(watch), describe_run(Roles(critic=True), first_step=3)


def test_a_rank_that_comes_early_waits_and_all_ranks_have_one_clock() -> None:
    (ranks, described), (nothing, same) = gloo.run(slow_first_rank, 2)
    assert nothing is None and same == described and ranks is not None
    slow, fast = ranks
    assert [span.name for span in slow] == [span.name for span in fast] == [WAITING, "update"]
    assert busy_seconds(fast, "update") < busy_seconds(slow, "update") - NAP / 2
    assert fast[0].end - fast[0].begin > NAP / 2 > slow[0].end - slow[0].begin
    assert abs(fast[1].end - slow[1].end) < NAP / 2  # they met there
    assert 0.05 < idle_shares(ranks)["time/idle/step"] < 0.5
    assert described["first_step"] == 3 and described["roles"]["critic"] and not described["roles"]["reference"]
    assert len(described["ranks"]) == 2 and {"host", "device", "memory"} == described["ranks"][0].keys()


class Half(Pool):
    """Every second answer is right."""

    def __init__(self) -> None:
        self.count = 0

    def reward(self, number: int, seed: int) -> Reward:
        self.count += 1
        return Reward(float(self.count % 2), "correct" if self.count % 2 else "wrong")


class Napping:
    """An engine that takes NAP on rank 1 and no time on rank 0."""

    def generate(self, requests: Sequence[Request], *_: Any) -> list[Sample]:
        time.sleep(NAP * dist.get_rank())
        return [Sample(r.prompt_ids, (1,), (0.0,), str(r.seed), False, 0) for r in requests]


def rollout_of_a_slow_rank(rank: int, world: int) -> list[Any]:
    """Times and spans of a rollout, without and with a round that may stop early."""
    cpu_compat.enter()
    found = []
    parallel.initialize(layout := ParallelConfig(ranks_per_node=world))
    for stop_group in (None, parallel.new_gloo()):
        rollout = RolloutConfig(prompts=4, samples=2, dynamic_sampling=stop_group is not None, oversample=2.0)
        config = Config(parallel=layout, rollout=rollout, train=TrainConfig(mini_batch_prompts=4))
        with Watch(1, show=False) as watch:
            meet(watch)
            watch.restart()
            parts: Any = (config, Napping(), Half(), 0, watch)
            Rollouts(*parts, stop_group=stop_group).collect(
                lambda count: [(Problem(str(i), "", ""), (i,)) for i in range(count)]
            )
            found.append((watch.times(), gather(watch)))
    return found


def test_a_rollout_lasts_until_the_slowest_rank_has_its_responses() -> None:
    """Also where the others have stopped early, and tell each other so."""
    for (times, ranks), (other, _) in zip(*gloo.run(rollout_of_a_slow_rank, 2), strict=True):
        assert min(times["time/rollout_s"], other["time/rollout_s"]) > 0.8 * NAP
        assert max(times["time/reward_s"], other["time/reward_s"]) < NAP / 2
        early, late = ranks
        assert busy_seconds(early, "rollout") < NAP / 2 < busy_seconds(late, "rollout")
        assert sum(span.end - span.begin for span in early if span.name == WAITING) > 0.8 * NAP
        assert idle_shares(ranks)["time/idle/step"] > 0.25


def spans_of_a_step(rank: int, world: int, path: str, method: dict, mini_batch: int) -> list[Span]:
    several = TrainConfig(mini_batch_prompts=mini_batch, micro_batch_tokens=22, share_prompts=False)  # micro-batches
    learner = learner_of(path, world, method, {"ranks_per_node": 2}, train=several)
    with Watch(1, show=False) as watch:
        data = parallel.groups.data()
        learner.step([each for each in tiny.episodes() if each.group % data.size() == data.rank()], watch)
        return watch.take_spans()


@pytest.mark.parametrize(
    ("method", "mini_batch", "waits"),
    [
        ({"name": "grpo"}, 4, {"old_logprob": 1, "update": 1}),
        ({"name": "grpo"}, 2, {"old_logprob": 1, "update": 2}),
        ({"name": "siren", "coef": 0.7}, 2, {"old_logprob": 1, "update": 3}),  # the second update measures the policy
    ],
    ids=str,
)
def test_ranks_meet_before_they_need_one_another(method: dict, mini_batch: int, waits: dict[str, int]) -> None:
    """Once behind the passes before the first update, once in every update, once behind a pass of the moved policy."""
    for spans in gloo.run(spans_of_a_step, 2, str(tiny.hf_model()[1]), method, mini_batch):
        phases = {span.name: span for span in spans if span.name != WAITING}
        found = dict.fromkeys(phases, 0)
        for wait in (span for span in spans if span.name == WAITING):
            [phase] = [name for name, span in phases.items() if span.begin <= wait.begin and wait.end <= span.end]
            found[phase] += 1
        assert found == waits


def test_a_timeline_is_cut_with_the_metrics_of_its_steps(tmp_path: Path) -> None:
    ranks = [[Span("rollout", 0.0, 1.23456), Span(WAITING, 1.23456, 2.0)], [Span("rollout", 0.0, 2.0)]]
    with MetricsWriter(tmp_path, trackers=[], total_steps=3) as writer:
        for step in (1, 2, 3):
            writer.write_timeline(step, ranks)
            writer.write(step, {"time/step_s": 2.0})
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('{"step": 4, "na')  # killed
    with MetricsWriter(tmp_path, trackers=[], total_steps=3, resume_step=2) as writer:
        writer.write_timeline(3, ranks[:1])
    [first, second, third] = read_steps(tmp_path / "timeline.jsonl")
    assert first == second | {"step": 1} and third["ranks"] == first["ranks"][:1]
    assert first["names"] == ["rollout", "waiting"]
    assert first["ranks"] == [[[0, 0.0, 1.2346], [1, 1.2346, 2.0]], [[0, 0.0, 2.0]]]


def test_the_spans_of_a_long_timeline_are_not_read_to_cut_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on many ranks that goes on has hundreds of megabytes of them."""
    with MetricsWriter(tmp_path, trackers=[], total_steps=3) as writer:
        for step in (1, 2, 3):
            writer.write_timeline(step, [[Span("rollout", 0.0, 1.0)]] * 400)
            writer.write(step, {})
    monkeypatch.setattr("megatron_ext.metrics.writer.parse_json", short_json)
    MetricsWriter(tmp_path, trackers=[], total_steps=3, resume_step=2)
    monkeypatch.undo()
    assert [line["step"] for line in read_steps(tmp_path / "timeline.jsonl")] == [1, 2]
    (tmp_path / "timeline.jsonl").write_text('{"step": 1, "names": [], "ranks": [[]]}\n{"step": 2, "na\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: no object with an integer step"):
        MetricsWriter(tmp_path, trackers=[], total_steps=3, resume_step=2)


def short_json(text: bytes) -> Any:
    assert len(text) < 1000
    return json.loads(text)


def test_what_the_planner_has_to_know_is_written_whole(tmp_path: Path) -> None:
    write_planner(tmp_path, {"first_step": 1})
    assert json.loads((tmp_path / "planner.json").read_text()) == {"first_step": 1}


def test_a_run_leaves_its_timeline_and_what_the_planner_needs(tmp_path: Path) -> None:
    """Of each step and both ranks; the first two steps of a start do not count as measured, the last two do."""
    assert whole_run.train(tmp_path, "siren/siren-tiny-cpu.toml", "train.steps=4", world=2) == 0
    folder = tmp_path / "run"
    lines = list(read_steps(folder / "timeline.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    phases = {"sync", "rollout", "reward", "old_logprob", "update", "save", WAITING}
    for line, metrics in zip(lines, whole_run.steps(tmp_path), strict=True):
        assert set(line["names"]) == phases and len(line["ranks"]) == 2
        for rank in line["ranks"]:
            assert all(0 <= begin <= end for _, begin, end in rank)
            meetings = [name for name, _, _ in rank if line["names"][name] == WAITING]
            assert len(meetings) >= 4  # after the rewards and the old pass, and in two updates
        for phase in ("rollout", "old_logprob", "update", "step"):
            assert 0 <= metrics[f"time/idle/{phase}"] < 1
        assert metrics["prompt/length"] > 3
    page = report(folder)
    assert "<h2>Timeline</h2>" in page and "First step: 1" in page and "rank 1: update" in page
    assert "<h2>Plan</h2>" in page and "medians of 2 on 2 x cpu" in page
    measured = read_measured(folder)
    rows = {each.phase: each for each in comparison(measured)}
    assert measured.gpu is None and measured.roles.current and rows["rollout"].at_assumed_rates is None
    assert rows["rollout"].measured == pytest.approx(rows["rollout"].at_its_own)

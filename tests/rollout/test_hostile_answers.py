"""A corpus of answers, from honest to hostile, through the real pool: each earns what the file says, in its time."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.rewards.worker_pool import NO_VERDICT
from megatron_ext.types import Problem, Reward

GROUPS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("hostile_answers.toml").read_text())["group"]
DEADLINE_S = 10.0  # what a recipe has by default


def entries_of(*, bombs: bool) -> list[tuple[dict[str, Any], str, str]]:
    """``(group, gold, answer)`` of every pair."""
    return [(group, *pair) for group in GROUPS if group.get("bomb", False) is bombs for pair in group["pairs"]]


def score(pool: RewardPool, entries: list[tuple[dict[str, Any], str, str]]) -> list[Reward]:
    """Each in the format of its group."""
    rewards: list[Reward | None] = [None] * len(entries)
    for pool.answer_format, response in (
        ("boxed", r"So it is \boxed{{{}}}."),
        ("answer_line", "So it is.\nAnswer: {}"),
    ):
        asked = [i for i, (group, _, _) in enumerate(entries) if group.get("format", "boxed") == pool.answer_format]
        problems = [Problem(entries[i][2], "", entries[i][1], entries[i][0].get("verifier", "math")) for i in asked]
        answers = [(problem, response.format(problem.problem_id)) for problem in problems]
        for i, reward in zip(asked, pool.score(answers), strict=True):
            rewards[i] = reward
    return [reward for reward in rewards if reward is not None]


def test_every_answer_earns_its_reward_in_its_time():
    entries, bombs = entries_of(bombs=False), entries_of(bombs=True)
    assert len({(str(group), gold, answer) for group, gold, answer in entries}) == len(entries) >= 150
    with RewardPool(2, deadline_s=DEADLINE_S) as pool:
        scored = score(pool, entries)
        pool.deadline_s = 2.0  # no bomb ends by itself
        started = time.monotonic()
        exploded = score(pool, bombs)
        elapsed = time.monotonic() - started
    faults = [
        f"{gold!r} answered by {answer!r}: {reward.value} ({reward.outcome}), must be {group['reward']}: {group['why']}"
        for (group, gold, answer), reward in zip(entries + bombs, scored + exploded, strict=True)
        if reward.value != group["reward"]
    ]
    assert not faults, "\n".join(faults)
    late = [entry for entry, reward in zip(entries, scored, strict=True) if reward.outcome in NO_VERDICT]
    assert not late, f"above {DEADLINE_S} s or fatal: {late}"
    assert Outcome.TIMEOUT in {reward.outcome for reward in exploded}
    assert elapsed < 2.0 * len(bombs) + 120  # and room for new workers' imports on a busy machine

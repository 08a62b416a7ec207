"""A PPO run stopped and continued ends with the bits of one that was not: critic, its optimizer, the steps begun."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.train import loop
from megatron_ext.train.config import load_config
from tests import gloo

RECIPE = Path(__file__).parents[2] / "recipes/ppo/ppo-tiny-cpu.toml"
SMALL = [
    *("rollout.prompts=2", "rollout.samples=2", "train.mini_batch_prompts=1", "rollout.max_response_tokens=16"),
    *("checkpoint.every=2", "log.tensorboard=false", "method.critic_only_steps=3", "critic.warmup_steps=9"),
]


def train(rank: int, world: int, folder: str, *overrides: str) -> int:
    """A run on the first problems of the tiny task."""
    data = Path(folder) / "train.jsonl"
    if rank == 0:
        lines = (RECIPE.parents[1] / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)
        data.write_text("".join(lines[:20]))
    dist.barrier()
    overrides = (f'data.train="{data}"', *overrides)
    return loop.run(load_config(RECIPE, [f'log.dir="{folder}"', *SMALL, *overrides]))


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "ppo-tiny-cpu/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "speed/"))} for line in lines]


def contents(folder: Path) -> dict[str, str]:
    """The last checkpoint's files by hash, but for torch's index, which holds a random identifier."""
    files = (folder / "ppo-tiny-cpu/checkpoints/step_000005").iterdir()
    ignored = (".metadata", "MANIFEST.json")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.name not in ignored}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert gloo.run(train, 2, str(folder), "train.steps=5", timeout=200) == [0, 0]
    return folder


def test_a_continued_run_has_the_bits_of_an_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    for steps in (2, 5):
        assert gloo.run(train, 2, str(tmp_path), f"train.steps={steps}", timeout=200) == [0, 0]
    assert metrics(tmp_path) == metrics(whole)
    assert contents(tmp_path) == contents(whole)
    state = torch.load(whole / "ppo-tiny-cpu/checkpoints/step_000005/state.pt", weights_only=True)
    assert state["state"]["method"] == {"step": 5} and set(state["scheduler"]) == {"policy", "critic"}
    assert state["scheduler"]["critic"]["num_steps"] == 1 + 5 * 2
    assert state["scheduler"]["policy"]["num_steps"] == 1 + 2 * 2


def test_what_a_run_reports(whole: Path) -> None:
    steps = metrics(whole)
    assert ["loss/policy" in step for step in steps] == [False, False, False, True, True]
    for name in ("loss/value", "critic/value", "critic/return", "critic/clipped", "critic/grad_norm"):
        assert all(isinstance(step[name], float) for step in steps), name
    assert all("critic/explained_variance" in step for step in steps)
    assert steps[0]["critic/value"] == 0 and steps[1]["critic/value"] != 0
    # the warm-up is the critic's own: two updates a step
    assert [step["critic/lr"] for step in steps] == pytest.approx(
        [4e-4 * min(n, 9) / 9 for n in (1.5, 3.5, 5.5, 7.5, 9)]
    )

"""The race of steps: TRL gets the settings and the token ids of our run, and nothing is timed without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ext.config.loading import load_config
from megatron_ext.rollout.model_files import load_tokenizer
from tools.bench import command
from tools.bench.step import PEER, PHASES, ours, recipe_of, settings_of, table

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_peer_trains_on_the_settings_and_the_prompts_of_the_recipe(tmp_path: Path) -> None:
    found = settings_of(load_config(recipe_of("dr_grpo"), ["train.steps=3"]), tmp_path, 2)
    assert json.loads(json.dumps(found))["updates"] * found["mini_batch_prompts"] == 32 and found["samples"] == 8
    assert (found["lr"], found["weight_decay"], found["clip_grad"]) == (2e-4, 0.01, 1.0)
    assert (found["clip_low"], found["clip_high"]) == (0.2, 0.28) and found["steps"] == 3
    tokenizer = load_tokenizer(found["model"])
    first = found["problems"][0]
    assert first["text"] == "<user>7 6 5 > 37?<assistant>" and first["numbers"] == (7, 6, 5)
    assert tuple(tokenizer.encode(first["text"], add_special_tokens=False)) == first["ids"]


def test_without_the_peer_nothing_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["step", "--peer", str(tmp_path)]) == 2
    assert f"make {tmp_path}/.installed" in capsys.readouterr().err


def test_times_are_shown_over_the_peers() -> None:
    phases = dict.fromkeys(PHASES, 0.1)
    made = [
        {"size": "tiny", "run": label, "step_s": 0.6 + i / 10, "phases": phases, "parameters": 8e5, "avg@8": 0.3}
        for i, (label, *_) in enumerate(ours(2))
    ]
    rows = [*made, {"size": "tiny", "run": PEER, "step_s": 0.8, "parameters": 8e5}]
    console = Console(width=120, record=True)
    console.print(table(rows, 2, 24))
    lines = [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]
    assert ["0.8 M", "dr_grpo DP 2", "0.600", "0.75", *["0.100"] * 5, "30.0%"] in [line[1:-1] for line in lines]

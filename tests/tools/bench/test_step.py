"""The race of steps: TRL gets the settings and the token ids of our run, and nothing is timed without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_ext.config.loading import load_config
from megatron_ext.rollout.model_files import load_tokenizer
from tools.bench import command
from tools.bench.step import PEER, PHASES, ours, over_rounds, recipe_of, settings_of, table

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


def test_times_are_shown_over_those_of_their_round() -> None:
    """On a machine whose speed changes between our runs and the peer's too: no median is that of another round."""

    def measured(slowness: float, peer_slowness: float, **evaluated: float) -> list[dict[str, Any]]:
        phases = dict.fromkeys(PHASES, 0.1 * slowness)
        made: list[dict[str, Any]] = [
            {"size": "tiny", "run": label, "step_s": (0.6 + i / 10) * slowness, "phases": phases, "parameters": 8e5}
            for i, (label, *_) in enumerate(ours(2))
        ]
        peer = {"size": "tiny", "run": PEER, "step_s": 0.8 * peer_slowness, "parameters": 8e5}
        return [*({**each, **evaluated} for each in made), peer]

    rounds = [measured(1.0, 3.0, **{"avg@8": 0.3}), measured(2.0, 1.0), measured(3.0, 2.0)]
    rows = [over_rounds(rounds, number) for number in range(4)]
    console = Console(width=120, record=True)
    console.print(table(rows, 2, 24))
    lines = [[cell.strip() for cell in line.split("│")] for line in console.export_text().splitlines()]
    shown = [line[1:-1] for line in lines]
    assert ["0.8 M", "dr_grpo DP 2", "1.200", "1.12", "1.00", *["0.200"] * 5, "30.0%"] in shown
    assert ["0.8 M", "siren DP 2", "1.400", "1.31", "1.17", *["0.200"] * 5, "30.0%"] in shown

"""Every shipped full-size recipe at its full world size, without a GPU; and what the dry run would not let pass."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import dry_run, train
from tools.dry_run import Shards, full_size_recipes, inspect
from tools.plan import read_valid

ROOT = Path(__file__).parents[2]
MOE = ROOT / "recipes" / "aer" / "aer-qwen3-30b-a3b-base-4n8g.toml"
LONG = ROOT / "recipes" / "siren" / "siren-llama-3.1-8b-1n8g.toml"
SMALL = ROOT / "recipes" / "siren" / "siren-qwen2.5-math-1.5b-1n8g.toml"


@pytest.fixture(scope="module")
def shards() -> Iterator[Shards]:
    with Shards() as shards:
        yield shards


def test_every_recipe_is_what_its_name_says_and_its_shards_are_what_was_planned() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tools.dry_run", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    found = {each["recipe"]: each for each in json.loads(done.stdout)}
    assert set(found) == {path.stem for path in full_size_recipes()} and len(found) > 60
    for name, each in found.items():
        assert each["wrong"] == [], name
        assert each["fits"] and each["free"] >= 3e9, name
        nodes, gpus = map(int, re.findall(r"-(\d+)n(\d+)g$", name)[0])
        assert each["groups"]["world"] == nodes * gpus <= 64, name
        method, model = name.split("-")[0], Path(each["model"]).name
        assert name.startswith(f"{method}-{model}-"), name
    assert done.returncode == 0


def test_without_recipes_there_is_nothing_that_could_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dry_run, "RECIPES", tmp_path)
    assert dry_run.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"no full-size recipe (*/*-NnMg.toml) below {tmp_path}" in said.err


@pytest.mark.parametrize("path", full_size_recipes(), ids=lambda path: path.stem)
def test_a_recipe_stands_with_its_method(path: Path) -> None:
    config = read_valid(path)
    assert config.name == path.stem and config.method["name"] == path.parent.name == path.stem.split("-")[0]
    assert len(path.read_text().splitlines()) <= 18  # what differs, nothing else


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pipeline=2", "parallel.virtual=2", "parallel.expert=4"],
        ["parallel.expert=8", "parallel.expert_tensor=2"],
        ["parallel.tensor=2", "parallel.pipeline=4", "parallel.stage_layers=[1,2,3,2]", "parallel.expert=4"],
    ],
)
def test_other_layouts_of_the_experts(overrides: list[str], shards: Shards, tmp_path: Path) -> None:
    hf = json.loads((ROOT / "recipes" / "models" / "qwen3-30b-a3b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_hidden_layers": 8}))
    plan, checks = inspect(read_valid(MOE, [*overrides, f'model.path="{tmp_path}"']), shards)
    assert [str(check) for check in checks if not check.right] == []
    assert len(shards.build(plan)) == plan.config.parallel.pipeline
    outside = 2 * 151936 * 2048 + 2048  # embedding, output layer, final norm
    assert sum(shard.hf_elements for shard in shards.build(plan)) == outside + (30_532_122_624 - outside) * 8 // 48


@pytest.mark.parametrize(
    ("tokens", "overrides"),
    [
        (32_768, ["parallel.context=2"]),
        (131_072, ["parallel.nodes=4", "parallel.context=8", "model.fused_head=true"]),
        (131_072, ["parallel.nodes=4", "parallel.context=4", "parallel.pipeline=2", "model.recompute=mlp"]),
    ],
)
def test_long_sequences_are_cut_over_ranks(tokens: int, overrides: list[str], shards: Shards) -> None:
    lengths = ["data.max_prompt_tokens=1024", f"rollout.max_response_tokens={tokens - 1024}"]
    lengths.append(f"train.micro_batch_tokens={tokens}")
    plan, checks = inspect(read_valid(LONG, [*lengths, *overrides]), shards)
    assert [str(check) for check in checks if not check.right] == []
    size = plan.config.parallel.context
    assert f"each of {size} context-parallel ranks has {tokens // size:,}, and predicts at most" in str(checks[0])
    assert plan.groups()["context"] == size and plan.groups()["data"] * size * 4 <= 32


def test_a_tied_embedding_over_two_stages_and_a_padded_vocabulary(shards: Shards) -> None:
    plan, checks = inspect(read_valid(SMALL, ["parallel.pipeline=2", "parallel.tensor=2"]), shards)
    assert all(check.right for check in checks)
    assert sum(shard.hf_elements for shard in shards.build(plan)) == 1_543_714_304
    tiny = ROOT / "recipes" / "siren" / "siren-tiny-cpu.toml"
    assert all(check.right for check in inspect(read_valid(tiny), shards)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hf_elements": 1_543_714_303}, "config.json gives 1,543,714,304"),
        ({"held": {"weights": 1}}, "weights 1 built, 3,087,"),
        ({"stream": [("model.norm.weight", (1536,))]}, "export: 338 tensors"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], message: str, shards: Shards) -> None:
    plan, _ = inspect(read_valid(SMALL), shards)
    [built] = shards.build(plan)

    class Changed(Shards):
        def build(self, plan: Any) -> list[Any]:
            return [dataclasses.replace(built, **change)]

    with Changed() as changed:
        wrong = [str(check) for check in changed.checks(plan) if not check.right]
    assert len(wrong) == 1 and wrong[0].startswith("WRONG: ") and message in wrong[0]


def test_what_is_not_here_is_named_and_is_no_fault(capsys: pytest.CaptureFixture) -> None:
    sent = ROOT / "recipes" / "sent" / "sent-qwen2.5-math-7b-1n8g.toml"
    assert train.main([str(sent), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "weights: not found here, to be prepared with hf download Qwen/Qwen2.5-Math-7B --local-dir " in text
    assert re.search(r"data.train: \S+dapo-math-17k.jsonl not found here, to be prepared from BytedTsinghua-SIA", text)
    assert re.search(r"data.curriculum: \S+ not found here, to be prepared with megatron-entropy semantic", text)
    assert "stand in for it: prompts of at most 1024 tokens: 32 of 32 problems kept" in text
    assert "all shards together have 7,615,616,512 parameters, config.json gives 7,615,616,512" in text
    assert "2 updates of 1024 responses" in text and "the reference" in text


def test_what_a_run_begins_from_and_validates_on_is_named(capsys: pytest.CaptureFixture) -> None:
    siren = ROOT / "recipes" / "siren" / "siren-qwen2.5-math-7b-2n8g.toml"
    assert train.main([str(siren), "--dry-run", 'model.weights="gone/step_000040"']) == 0
    text = capsys.readouterr().out
    assert re.search(r"validation.data: \S+aime24.jsonl not found here, to be prepared with megatron-entropy", text)
    assert "model.weights: " in text and "step_000040 not found here: it is a checkpoint of another run" in text
    assert ("rollout.engine: vllm: " in text) == (importlib.util.find_spec("vllm") is None)


def test_a_recipe_that_does_not_fit_is_wrong(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    recipe = tmp_path / "large.toml"
    recipe.write_text(f'parent = "{SMALL}"\nname = "large"\n[train]\nmicro_batch_tokens = 65536\n')
    assert dry_run.main([str(recipe)]) == 1
    assert "WRONG: " in capsys.readouterr().out
    recipe.write_text(f'parent = "{SMALL}"\nname = "large"\n[parallel]\ntensor = 5\n')
    assert dry_run.main([str(recipe)]) == 2
    assert "does not divide" in capsys.readouterr().err

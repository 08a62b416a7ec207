"""A suite through the real command, engine and verifier on the tiny base model: tables, figures, and what resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.config.shipped import RECIPES
from megatron_ext.rollout.base import Request
from megatron_ext.rollout.hf.engine import HFEngine
from tests import warm
from tools.evaluate import main
from tools.samples import read_samples

ROOT = Path(__file__).parents[2]
BASE = RECIPES / "tiny" / "base"
SETS = ("sums", "fractions", "pairs", "rare", "small", "large")
QUICK = ["--workers", "1", "--max-response-tokens", "16"]


def suite(folder: Path, text: str = "", **sets: str) -> Path:
    """A suite of the tiny suite's data; ``sets``: TOML of each."""
    path = folder / "mine.toml"
    data = {name: RECIPES / "tiny" / "data" / "suite" / f"{name}.jsonl" for name in SETS}
    parts = [
        f'[[set]]\nname = "{name}"\n{more}\n' + ("" if "data =" in more else f'data = "{data[name]}"\n')
        for name, more in sets.items()
    ]
    path.write_text(text + "\n" + "\n".join(parts))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Of a command that is refused."""
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def load(path: Path) -> Any:
    """A result without its clock readings."""
    result = json.loads(path.read_text())
    for model in result["models"].values():
        for each in model["sets"].values():
            del each["time"]
    return result


class Asked:
    """The requests that reach the engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[Request] = []
        generate = HFEngine.generate

        def counted(engine: HFEngine, requests: Sequence[Request], *more: Any) -> Any:
            self.requests += requests
            return generate(engine, requests, *more)

        monkeypatch.setattr(HFEngine, "generate", counted)


def test_a_killed_suite_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six sets of a problem, 32 samples each; killed in the second set at the earliest, with a line torn."""
    common = [str(BASE), "--suite", "tiny", *QUICK, "--samples", "32", "--limit", "1", "--batch-size", "16"]
    command = [sys.executable, "-m", "tools.evaluate", *common, "--out", str(tmp_path / "killed")]
    samples = tmp_path / "killed" / "samples" / "base"
    with warm.popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        try:
            while not (file := samples / "fractions.jsonl").exists() or len(list(read_samples(file))) < 16:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
    done = {name: [(r.id, r.sample) for r in read_samples(samples / f"{name}.jsonl")] for name in SETS}
    num_done = sum(map(len, done.values()))
    assert len(done["sums"]) == 32 and 48 <= num_done < 192
    with (samples / "large.jsonl").open("a") as file:
        file.write('{"set": "large", "id": "tiny-e')

    asked = Asked(monkeypatch)
    assert main([*common, "--out", str(tmp_path / "killed")]) == 0
    assert "sums: 32 of 32 responses are there" in capsys.readouterr().out
    assert len(asked.requests) == 192 - num_done
    for name in SETS:
        keys = [(r.id, r.sample) for r in read_samples(samples / f"{name}.jsonl")]
        assert len(keys) == len(set(keys)) == 32 and keys[: len(done[name])] == done[name]

    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    assert len(asked.requests) == 192 - num_done + 192
    assert load(tmp_path / "killed" / "tiny.json") == load(tmp_path / "whole" / "tiny.json")
    for name in SETS:
        first, second = (
            sorted((tmp_path / way / "samples/base" / f"{name}.jsonl").open()) for way in ("killed", "whole")
        )
        assert first == second

    before = len(asked.requests)
    monkeypatch.setattr(HFEngine, "__init__", lambda *_, **__: pytest.fail("the model is loaded for nothing"))
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    assert len(asked.requests) == before


def test_more_samples_add_to_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    command = [str(BASE), "--suite", "tiny", "--only", "sums", "--limit", "3", *QUICK, "--out", str(tmp_path / "a")]
    assert main([*command, "--samples", "2"]) == 0
    assert main([*command, "--samples", "5"]) == 0
    assert len(asked.requests) == 15 == len({request.seed for request in asked.requests})
    result = load(tmp_path / "a" / "tiny.json")
    assert [column["metric"] for column in result["columns"]] == ["avg@5"]  # instead of avg@8
    assert result["models"]["base"]["sets"]["sums"]["decoding"]["ks"] == [1, 2, 4]
    alone = [*command[:1], "--data", "recipes/tiny/data/suite/sums.jsonl", "--limit", "3", *QUICK, "--samples", "5"]
    assert main([*alone, "--max-prompt-tokens", "48", "--out", str(tmp_path / "alone.json")]) == 0
    evaluation = json.loads((tmp_path / "alone.json").read_text())["evaluation"]
    assert evaluation["problems"] == result["models"]["base"]["sets"]["sums"]["problems"]


def test_one_file_goes_on_where_it_was_stopped_and_leaves_its_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in its third batch, by Ctrl-C; without --out nothing can be kept, and that is said."""
    data = ["--data", "recipes/tiny/data/suite/sums.jsonl", "--limit", "4", "--samples", "8", "--batch-size", "8"]
    common, out = [str(BASE), *data, *QUICK], tmp_path / "a" / "evaluation.json"
    generate, batches = HFEngine.generate, list[int]()

    def stopped(engine: HFEngine, requests: Sequence[Request], *more: Any) -> Any:
        batches.append(len(requests))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(engine, requests, *more)

    monkeypatch.setattr(HFEngine, "generate", stopped)
    assert main([*common, "--out", str(out)]) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    batches[:] = batches[:2]
    assert main(common) == 130
    assert "without --out no response is kept" in capsys.readouterr().err
    monkeypatch.undo()

    there = len(list(read_samples(out.with_name("evaluation.json.partial") / "evaluation" / "sums.jsonl")))
    assert there == 16
    assert "decoding.temperature: 1.0 there, 0.5 now" in told(capsys, *common, "--temperature", "0.5", "--out", out)
    asked = Asked(monkeypatch)
    assert main([*common, "--out", str(out)]) == 0
    assert len(asked.requests) == 32 - there and f"{there} of 32 responses are there" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["evaluation.json"]
    assert main([*common, "--out", str(tmp_path / "whole.json")]) == 0
    found, whole = (json.loads(path.read_text())["evaluation"] for path in (out, tmp_path / "whole.json"))
    assert {**found, "time": 0} == {**whole, "time": 0}


def test_the_last_models_positions_are_looked_at_before_the_first_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short"
    shutil.copytree(BASE, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    asked = Asked(monkeypatch)
    data = ["--data", "recipes/tiny/data/suite/sums.jsonl", "--limit", "2"]
    assert "has 24 positions" in told(capsys, BASE, short, *data, *QUICK)
    assert not asked.requests


def noisy(folder: Path) -> Path:
    """The base model with other weights."""
    shutil.copytree(BASE, folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 0.02 * torch.randn_like(v) for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def resampled(values: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Averages over sets, with problems drawn one by one."""
    generator = np.random.default_rng(seed)
    return np.array(
        [np.mean([v[generator.integers(len(v), size=len(v))].mean() for v in values]) for _ in range(20_000)]
    )


def test_models_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = suite(
        tmp_path,
        'title = "Mine"\n[defaults]\nsamples = 4\nks = [1, 2, 4]\nmax_response_tokens = 16\n'
        'metric = ["avg@4", "pass@4"]',
        sums='title = "Sums"',
        small='title = "Small"\nsamples = 8\nmetric = ["avg@8", "pass@8"]',
    )
    monkeypatch.setenv("COLUMNS", "160")
    models = [str(BASE), str(noisy(tmp_path / "trained"))]
    assert main([*models, "--suite", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    result = load(tmp_path / "out" / "mine.json")
    sets = {label: model["sets"] for label, model in result["models"].items()}
    assert list(sets) == ["base", "trained"]
    assert sets["base"]["sums"]["decoding"]["ks"] == [1, 2, 4]
    assert sets["base"]["small"]["decoding"]["ks"] == [1, 2, 4, 8]  # those of all sets, and the column's

    solved = {
        label: [np.array([row["c"] / row["n"] for row in sets[label][name]["problems"]]) for name in ("sums", "small")]
        for label in sets
    }
    for label, values in solved.items():
        average = result["models"][label]["average"][0]
        assert average["mean"] == pytest.approx(np.mean([v.mean() for v in values]))
        low, high = np.quantile(resampled(values, 1), [0.025, 0.975])
        assert average["low"] == pytest.approx(low, abs=0.025) and average["high"] == pytest.approx(high, abs=0.025)
    changes = [b - a for a, b in zip(solved["base"], solved["trained"], strict=True)]
    found = result["differences"]["trained"]
    assert found["to"] == "base"
    for values, interval in (
        ([changes[0]], found["sets"]["sums"]["avg@4"]),
        ([changes[1]], found["sets"]["small"]["avg@8"]),
        (changes, found["average"][0]),
    ):
        assert interval["mean"] == pytest.approx(np.mean([v.mean() for v in values]))
        low, high = np.quantile(resampled(values, 2), [0.025, 0.975])
        assert interval["low"] == pytest.approx(low, abs=0.025) and interval["high"] == pytest.approx(high, abs=0.025)

    table, difference = said.split("Mine: % and 95 % interval")[1].split("difference to base")[:2]
    heads = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in table.splitlines() if "┃" in line]
    assert heads == [
        ["", "Sums", "Sums", "Small", "Small", "Average", "Average"],
        ["model", "avg@4", "pass@4", "avg@8", "pass@8", "avg", "pass"],
    ]
    (row,) = [line for line in table.splitlines() if "│ base" in line]
    average = result["models"]["base"]["average"]
    numbers = [cell.strip() for cell in row.split("│")[2:-1]]
    assert numbers[0] == f"{100 * sets['base']['sums']['metrics']['avg@4']['mean']:.1f}"
    assert numbers[4:] == [f"{100 * each['mean']:.1f}" for each in average]
    assert f"{100 * found['average'][0]['mean']:+.1f}" in difference
    curves = json.loads((tmp_path / "out" / "mine.pass_at_k.json").read_text())["pass_at_k"]
    assert list(curves["trained"]["small"]) == ["1", "2", "4", "8"]
    assert (tmp_path / "out" / "mine.pass_at_k.png").read_bytes().startswith(b"\x89PNG")


def test_missing_data_are_all_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "[defaults]\nsamples = 1\nmax_response_tokens = 16"
    path = suite(tmp_path, text, aime24='data = "data/aime24.jsonl"', sums="", amc23='data = "data/amc23-83.jsonl"')
    command = [BASE, "--suite", path, "--out", tmp_path / "out", "--workers", "1", "--limit", "1"]
    said = told(capsys, *command)
    for name, file in (("aime24", "aime24"), ("amc23", "amc23-83")):  # the data set is called as its file
        assert f"{name}: no data/{file}.jsonl; make it with: megatron-entropy data {file} SOURCE" in said
    assert "--skip-missing" in said and not (tmp_path / "out" / "samples").exists()
    assert "has no set amc; it has aime24, sums, amc23" in told(capsys, *command, "--only", "amc,sums")
    assert "no set has its data" in told(capsys, *command, "--only", "amc23", "--skip-missing")
    assert main([*map(str, command), "--skip-missing"]) == 0
    assert "left out, for their data are missing" in capsys.readouterr().out
    assert list(load(tmp_path / "out" / "mine.json")["models"]["base"]["sets"]) == ["sums"]


def test_data_of_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The files by their names; options win over defaults and sets, and columns and responses follow."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("sums", "large"):
        shutil.copy(RECIPES / "tiny" / "data" / "suite" / f"{name}.jsonl", folder)
    text = '[defaults]\nsamples = 8\nmax_response_tokens = 32\nmetric = ["maj@8", "avg@8"]'
    large = 'data = "data/large.jsonl"\nsamples = 4\nmax_response_tokens = 24\nmetric = ["maj@4", "pass@4"]'
    path = suite(tmp_path, text, sums='data = "data/sums.jsonl"', large=large)
    command = [BASE, "--suite", path, "--out", tmp_path / "out", "--workers", "1", "--limit", "1"]
    command += ["--samples", "2", "--max-response-tokens", "3"]
    assert "--data-dir" in told(capsys, *command)
    monkeypatch.setenv("COLUMNS", "150")
    assert main([*map(str, command), "--data-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    result = load(tmp_path / "out" / "mine.json")
    assert [column["metric"] for column in result["columns"]] == ["maj@2", "avg@2", "maj@2", "pass@2"]
    assert all(name in said for name in ("maj@2", "avg@2", "pass@2")) and "@8" not in said and "@4" not in said
    for name, found in result["models"]["base"]["sets"].items():
        assert found["data"]["path"] == str(folder / f"{name}.jsonl")
        assert (found["decoding"]["samples"], found["decoding"]["max_response_tokens"]) == (2, 3)
        responses = list(read_samples(tmp_path / "out/samples/base" / f"{name}.jsonl"))
        assert len(responses) == 2 and all(each.length <= 3 for each in responses)
    (folder / "sums.jsonl").unlink()
    command += ["--data-dir", folder]
    file = folder / "sums.jsonl"
    assert f"sums: no {file}; make it with: megatron-entropy data sums SOURCE --out {file}" in told(capsys, *command)
    both = suite(tmp_path, sums='data = "a/x.jsonl"', large='data = "b/x.jsonl"')
    said = told(capsys, BASE, "--suite", both, "--data-dir", folder)
    assert "same name in different folders: a/x.jsonl, b/x.jsonl" in said
    assert "--data-dir: is of --suite" in told(capsys, BASE, "--data", "x.jsonl", "--data-dir", folder)
    with pytest.raises(SystemExit, match="2"):
        main([str(BASE), "--suite", "tiny", "--data-dir", str(tmp_path / "none")])
    assert "--data-dir: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("[defaults]\nsamples = 0", "", "set sums: --samples: expected at least 1"),
        ("[defaults]\nsample = 4", "", "defaults.sample: Extra inputs"),
        ("[prompt]\nsufix = ''", "", "prompt.sufix"),
        ("", 'metric = "avg@32"', "metric: avg@32 is of 32 samples, found samples = 8"),
        ("", 'metric = "pass@32"', "metric: pass@32 needs as many samples, found samples = 8"),
        ("", 'metric = "mean@8"', "metric: found 'mean@8', expected avg@8"),
        ("", "samples = 4\nks = [1, 8]", "--k: pass@8 cannot be estimated"),
        ("", "temperature = 0.0", "--temperature 0 samples the same"),
        ("x", "", "is not TOML"),
    ],
)
def test_suites_that_cannot_be(
    text: str, more: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(capsys, BASE, "--suite", suite(tmp_path, text, sums=more), "--out", tmp_path / "out")
    assert message in said and "mine.toml" in said


def test_a_suite_that_does_not_ship(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, BASE, "--suite", "sirene")
    assert "no suite 'sirene'" in said and "tiny" in said
    assert "expected one of them" in told(capsys, BASE)
    assert "--only: is of --suite" in told(capsys, BASE, "--data", "x.jsonl", "--only", "sums")


def test_responses_beyond_the_positions_are_refused_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 9 and 10 tokens and a model of 12 positions leave 2 and 3 for a response."""
    model = tmp_path / "short"
    shutil.copytree(BASE, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    path = suite(tmp_path, "[defaults]\nsamples = 4\nmax_response_tokens = 32", sums="")
    command = [str(model), "--suite", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    said = told(capsys, *command)
    assert "has 12 positions and the longest prompt" in said and "32 are asked for" in said
    assert "--allow-shorter" in said and not (tmp_path / "out" / "samples").exists()
    assert "--max-prompt-tokens below 6" in told(capsys, *_positions(model, 6), *command[1:], "--allow-shorter")
    _positions(model, 12)
    monkeypatch.setenv("COLUMNS", "150")
    assert main([*command, "--allow-shorter"]) == 0
    said = capsys.readouterr().out
    result = load(tmp_path / "out" / "mine.json")["models"]["short"]["sets"]["sums"]
    lengths = result["lengths"]
    assert lengths["asked"] == 32 and lengths["positions"] == 12 and 0 < lengths["used_min"] < lengths["used_max"] < 12
    used = f"at most {lengths['used_min']} .. {lengths['used_max']} tokens instead of 32"
    assert used.replace(" ", "") in "".join(said.split())
    prompts = {row["id"]: len(row["prompt"]) + 2 for row in result["problems"]}  # tokens: its characters and two marks
    responses = list(read_samples(tmp_path / "out/samples/short/sums.jsonl"))
    assert all(prompts[r.id] + r.length <= 12 for r in responses)
    cut = [r for r in responses if r.truncated]
    assert cut and all(prompts[r.id] + r.length == 12 for r in cut)


def _positions(model: Path, positions: int) -> list[str]:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return [str(model)]


def test_models_whose_prompts_leave_out_different_problems_are_refused_before_anything_is_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model's template adds a token: its longest prompts have 11, and 10 are allowed."""
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    settings = (other / "tokenizer_config.json").read_text()
    longer = settings.replace("<user>{{ message.content }}", "<user>{{ message.content }}0")
    assert longer != settings
    (other / "tokenizer_config.json").write_text(longer)
    asked = Asked(monkeypatch)
    command = [BASE, other, "--only", "sums", "--max-prompt-tokens", "10", "--samples", "1", *QUICK]
    said = told(capsys, *command, "--suite", "tiny", "--out", tmp_path / "out")
    assert "sums: prompts that are too long leave different problems" in said and "tiny-eval-" in said
    assert "none to other alone" in said and not asked.requests


def test_responses_of_other_settings_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--suite", "tiny", "--only", "sums", "--limit", "1", "--samples", "1", *QUICK, "--out", str(tmp_path)]
    assert main([str(BASE), *command]) == 0
    capsys.readouterr()
    said = told(capsys, BASE, *command, "--temperature", "0.5", "--suffix", "!")
    assert "decoding.temperature: 1.0 there, 0.5 now" in said and 'prompt.suffix: "" there, "!" now' in said
    other = noisy(tmp_path / "other")
    said = told(capsys, other, *command, "--label", "base")
    assert "model.model.safetensors: " in said and "model.config.json" not in said


def test_golds_that_cannot_be_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "golds.jsonl"
    rows = [{"prompt": f"{i}+1=?", "answer": answer} for i, answer in enumerate(["1", r"\frac{", "3"])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(BASE), "--data", str(data), *QUICK, "--samples", "1", "--out", str(tmp_path / "e.json")]
    assert main(command) == 0
    assert "unparsable_gold 1" in capsys.readouterr().out
    evaluation = json.loads((tmp_path / "e.json").read_text())["evaluation"]
    assert evaluation["left_out"]["counts"] == {"unparsable_gold": 1} and evaluation["num_problems"] == 2
    assert "line 2" in evaluation["left_out"]["problems"][0]
    data.write_text(data.read_text() + '{"prompt": ""}\n')
    assert "1 of the 4 problems" in told(capsys, *command)


def test_levels_and_kinds(tmp_path: Path) -> None:
    command = [str(BASE), "--suite", "tiny", "--only", "pairs", "--samples", "2", *QUICK, "--out", str(tmp_path)]
    assert main(command) == 0
    found = load(tmp_path / "tiny.json")["models"]["base"]["sets"]["pairs"]
    rows = found["problems"]
    for level, value in found["accuracy"]["level"].items():
        of = [row["c"] / 2 for row in rows if row["level"] == level]
        assert value["problems"] == len(of) and value["mean"] == pytest.approx(np.mean(of))
    assert sum(value["problems"] for value in found["accuracy"]["level"].values()) == len(rows) == 12
    assert list(found["accuracy"]["kind"]) == ["countdown"]
    responses = list(read_samples(tmp_path / "samples/base/pairs.jsonl"))
    right = [r.length for r in responses if r.correct]
    assert found["length_of"]["correct"] == {"mean": np.mean(right) if right else None, "responses": len(right)}

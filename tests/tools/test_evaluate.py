"""An evaluation from responses to numbers by hand, and a real model through the real engine and verifier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.rollout.base import OnBatch, Request, Sampling
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.rewards.voting import equal_answers
from megatron_ext.types import Problem, Reward, Sample
from tests.tools.runs import evaluation
from tools import evaluate as tool
from tools.evaluate import Settings, load_evaluations, main, measure

SILENT = Console(quiet=True)


class FakeEngine:
    """Answers prompt ``(p,)`` with the p-th script in the order of the samples' seeds."""

    def __init__(self, scripts: dict[int, list[str]]):
        self.scripts, self.seeds = scripts, []

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch | None = None
    ) -> list[Sample]:
        self.seeds += [request.seed for request in requests]
        texts = [self.scripts[request.prompt_ids[0]].pop(0) for request in requests]
        return [
            Sample(request.prompt_ids, tuple(range(len(text))), (0.0,) * len(text), text, text.endswith("..."), 0)
            for request, text in zip(requests, texts, strict=True)
        ]


class FakePool:
    """``A=x`` answers x, correct when it has the value of the problem's answer; everything else says nothing."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
        return [self.reward(problem, text) for problem, text in answers]

    def reward(self, problem: Problem, text: str) -> Reward:
        if text.startswith("A="):
            text = text.removeprefix("A=")
        elif text.startswith(r"\boxed{"):
            text = text.removeprefix(r"\boxed{").removesuffix("}")
            self.asked.append((problem.answer, text))
        else:
            return Reward(0.0, "no_answer")
        if text == "bomb":
            return Reward(0.0, "timeout", text)
        correct = text.strip("$") == problem.answer.strip("$")
        return Reward(float(correct), "correct" if correct else "wrong", text)


def problems(*answers: str) -> list[tuple[Problem, tuple[int, ...]]]:
    return [(Problem(f"p{i}", f"prompt {i}", answer), (i,)) for i, answer in enumerate(answers)]


def test_numbers_by_hand():
    engine = FakeEngine(
        {
            0: ["A=7", "A=3", "A=7", "A=7"],  # c 3, majority 7 right
            1: ["A=$x", "A=2", "A=x", "A=5"],  # c 2 of gold x: "$x" and "x" together win over 2 and 5
            2: ["A=9", "A=9", "A=8", "hm..."],  # c 1 of gold 8: the majority is wrong
            3: ["hm", "hm", "A=bomb", "hm"],  # nobody votes
        }
    )
    asked = problems("7", "x", "8", "0")
    asked[0] = (replace(asked[0][0], kind="algebra"), asked[0][1])
    result = measure(engine, FakePool(), asked, Settings(samples=4), console=SILENT)
    rows = result["problems"]
    assert [rows[0][key] for key in ("prompt", "answer", "kind")] == ["prompt 0", "7", "algebra"]
    assert rows[1]["kind"] == "math"  # the verifier's name for want of another
    assert [(row["id"], row["n"], row["c"], row["majority"]) for row in rows] == [
        ("p0", 4, 3, True),
        ("p1", 4, 2, True),
        ("p2", 4, 1, False),
        ("p3", 4, 0, False),
    ]
    assert [row["majority_answer"] for row in rows] == ["7", "$x", "9", None]
    means = {name: value["mean"] for name, value in result["metrics"].items()}
    # pass@2 by hand: 1 - C(n-c,2)/6 = 1, 5/6, 3/6, 0
    assert means == pytest.approx({"avg@4": 6 / 16, "pass@1": 6 / 16, "pass@2": 14 / 24, "pass@4": 0.75, "maj@4": 0.5})
    assert result["metrics"]["maj@4"]["low"] == 0 and result["metrics"]["maj@4"]["high"] == 1
    assert result["response"]["truncated"]["mean"] == 1 / 16
    assert rows[0]["length"] == 3 and rows[3]["length"] == (2 + 2 + 6 + 2) / 4
    assert result["outcomes"] == {"correct": 6 / 16, "wrong": 5 / 16, "no_answer": 4 / 16, "timeout": 1 / 16}
    assert len(set(engine.seeds)) == 16
    assert result["decoding"]["ks"] == [1, 2, 4]
    json.dumps(result, allow_nan=False)


def test_votes_for_the_same_letter_and_for_the_same_number_count_together():
    """By hand: B thrice in three texts beats A twice, and one half 3, as answer lines."""
    letters = ["A", "(B)", "A", "B. the sum", r"\text{B}"]
    halves = ["3", "0.5", "3", r"\frac{1}{2}", r"$\frac{2}{4}$"]
    engine = FakeEngine({row: [f"So\nAnswer: {each}" for each in said] for row, said in enumerate([letters, halves])})
    asked = problems("B", "1/2")
    asked[0] = (replace(asked[0][0], verifier="choice"), asked[0][1])
    with RewardPool(1, answer_format="answer_line") as pool:
        result = measure(engine, pool, asked, Settings(samples=5), console=SILENT, answer_format="answer_line")
    assert [(row["c"], row["majority"], row["majority_answer"]) for row in result["problems"]] == [
        (3, True, "(B)"),
        (3, True, "0.5"),
    ]


def test_seeds_do_not_depend_on_later_problems():
    def seeds(count: int) -> list[int]:
        engine = FakeEngine({i: ["A=1"] * 2 for i in range(count)})
        measure(engine, FakePool(), problems(*"1" * count), Settings(samples=2), console=SILENT)
        return engine.seeds

    assert seeds(3) == seeds(5)[:6]


def test_answers_are_compared_to_the_earliest_and_numbers_without_the_verifier():
    pool = FakePool()
    votes = [["a", "$a", "b", "1", "2/2", "3-2", None, "$b", "a"], ["5", "6", "5"], [None], []]
    assert equal_answers(pool.score, [Problem("", "", "?")] * 4, votes) == [
        {("a", "$a"), ("b", "$b"), ("1", "2/2"), ("1", "3-2")},
        set(),
        set(),
        set(),
    ]
    assert ("1", "2/2") not in pool.asked and ("a", "1") in pool.asked and ("$a", "b") not in pool.asked


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 4, "ks": (1, 8)}, "--k: pass@8 .* --samples 4"),
        ({"samples": 4, "ks": (0,)}, "--k"),
        ({"samples": 0}, "--samples: expected at least 1"),
        ({"temperature": 0.0}, "use --samples 1"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"limit": 0}, "--limit"),
    ],
)
def test_settings_that_contradict_each_other(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Settings(**values)
    assert Settings(samples=1, temperature=0.0).reported_ks() == [1]
    assert Settings(samples=12).reported_ks() == [1, 2, 4, 8]


def test_bad_input_is_told_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1?", "answer": "2"}\n')
    model = tmp_path / "model"
    model.mkdir()

    def told(*arguments: str) -> str:
        assert tool.main([*arguments]) == 2
        return capsys.readouterr().err

    assert "MODEL: " in told(str(model), "--data", str(data))
    (model / "checkpoints").mkdir()
    assert f"of a run, export one: megatron-entropy convert to-hf {model} {model}/hf" in told(
        str(model), "--data", str(data)
    )
    (model / "config.json").write_text("{}")
    assert "no such file" in told(str(model), "--data", str(tmp_path / "none.jsonl"))
    assert "--samples 2" in told(str(model), "--data", str(data), "--samples", "2", "--k", "4")
    (tmp_path / "out.json").write_text('{"before": 3}')
    assert "out.json" in told(str(model), "--data", str(data), "--out", str(tmp_path / "out.json"))
    assert "cannot be loaded" in told(str(model), "--data", str(data), "--workers", "1")


@pytest.mark.parametrize("option", ["--batch-size=0", "--gpu-memory-utilization=1", "--tensor-parallel-size=-1"])
def test_an_engine_that_cannot_be_is_told_with_exit_code_2(option: str, capsys: pytest.CaptureFixture[str]):
    assert main(["nowhere", "--data", "nowhere.jsonl", option]) == 2
    assert f"evaluate: {option.split('=')[0]}: Input should be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tensor-parallel-size=2"],
            "--tensor-parallel-size: only vllm has this, found --engine hf; add --engine vllm",
        ),
        (
            ["--tensor-parallel-size=1", "--gpu-memory-utilization=.5", "--enforce-eager"],
            "--tensor-parallel-size, --gpu-memory-utilization, --enforce-eager: only vllm has this",
        ),
        (["--engine=vllm", "--tensor-parallel-size=2"], "MODEL: nowhere holds no config.json"),
        (["--label=a", "--label=b"], "--label: found a, b for 1 models"),
        (["--max-left-out=2"], "--max-left-out: expected a share from 0 to 1, found 2.0"),
    ],
)
def test_options_that_contradict_each_other(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["nowhere", "--data", "nowhere.jsonl", *options]) == 2
    assert message in capsys.readouterr().err


def test_gpus_that_cannot_share_a_models_heads_are_told(capsys: pytest.CaptureFixture[str]):
    model = "recipes/models/qwen2.5-math-7b"
    assert main([model, "--data", "nowhere.jsonl", "--engine=vllm", "--tensor-parallel-size=8"]) == 2
    said = capsys.readouterr().err
    assert f"{model}: --tensor-parallel-size: 8 does not divide the model's 28 attention heads" in said


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed=-5", "found '-5', expected a whole number of at least 0"),
        ("--workers=-1", "found '-1', expected a whole number of at least 0"),
        ("--k=a,b", "found 'a', expected a whole number of at least 1"),
        ("--out=/dev/null/x.json", "'/dev/null/x.json' cannot be written"),
        ("--out=/", "cannot be written"),
    ],
)
def test_an_option_that_cannot_be(option: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["nowhere", "--data", "nowhere.jsonl", option])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_several_models_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The numbers are given; what is told and written of them is real."""
    counts = {"base": [0, 1, 2], "[b]": [4, 4, 4], "other/hf": [0, 1, 2], "another/hf": [1, 1, 1]}
    for name in counts:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    given = {tmp_path / name: evaluation(values) for name, values in counts.items()}

    class Ready:
        """In the place of an evaluation: the folder of its responses is there."""

        def __init__(self, model: Path, sets: Any, *, samples_dir: Path | None, **_: Any) -> None:
            if samples_dir is not None:
                samples_dir.mkdir(parents=True)
            self.model = model

        def run(self, pools: Any) -> dict[str, Any]:
            return {"d": given[self.model]}

    monkeypatch.setattr(tool.command, "ModelEvaluation", Ready)
    monkeypatch.setattr(tool.command, "load_set", lambda *_: None)
    monkeypatch.setattr(tool.command, "open_pools", lambda *_: {"boxed": None})
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        assert main([*arguments, "--data", "d.jsonl", "--out", str(tmp_path / "out" / "all.json")]) == 0
        return capsys.readouterr().out

    said = run(str(tmp_path / "base"), str(tmp_path / "[b]"))
    values, changes = said.split("difference to base")
    assert "25.0% (" in values and "100.0% (100.0% .. 100.0%)" in values and "[b] ┃" in values
    row = next(line for line in changes.splitlines() if "avg@4" in line)
    assert "+75.0 (+50.0 .. +100.0)" in row
    assert list(load_evaluations(tmp_path / "out" / "all.json")) == ["base", "[b]"]

    hf = [str(tmp_path / "other" / "hf"), str(tmp_path / "another" / "hf")]
    run(*hf)
    run(*hf, "--label", "x", "--label", "y")
    found = load_evaluations(tmp_path / "out" / "all.json")
    assert list(found) == ["base", "[b]", *hf, "x", "y"]
    assert [row["c"] for row in found["y"]["problems"]] == [1, 1, 1]
    assert main([hf[0], hf[0], "--data", "d.jsonl"]) == 2
    assert "expected a different one for each" in capsys.readouterr().err
    assert main([hf[0], "nowhere", "--data", "d.jsonl"]) == 2  # before the first is evaluated
    assert capsys.readouterr().out == ""


def test_labels_share_a_file(tmp_path: Path):
    path = tmp_path / "run" / "evaluation.json"
    for label, mean in (("before", 1), ("after", 2), ("before", 3)):
        tool.save_evaluation(path, label, {"metrics": {"avg@1": mean}, "problems": []})
    found = load_evaluations(path)
    assert [(label, item["metrics"]["avg@1"]) for label, item in found.items()] == [("before", 3), ("after", 2)]
    assert list(path.parent.iterdir()) == [path]
    for text in ("", "[1]", '{"a": 1}', '{"a": {"metrics": {}}}', '"x"'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="evaluation.json"):
            load_evaluations(path)


def overfit(folder: Path, pairs: list[tuple[Problem, str]]) -> None:
    """A tiny model that has learnt exactly these responses."""
    from tools.tiny.base_model import build_model, build_tokenizer, encode

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    ids, labels = encode(tokenizer, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(100):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01  # sure of every token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers rebuilds the pre-tokenizer of a Qwen2 model's tokenizer unless the class is named like this
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_a_real_model_through_the_real_engine_and_verifier(tmp_path: Path):
    pairs = [
        (Problem("a", "1+1=?", "2"), r"\boxed{2}"),
        (Problem("b", "3/4-1/4=?", "1/2"), r"\boxed{2/4}"),
        (Problem("c", "3 2 1 > 9?", "9", "countdown", (3, 2, 1)), r"\boxed{3*(1+2)}"),
        (Problem("d", "2+2=?", "4"), r"\boxed{5}"),
        (Problem("e", "5+5=?", "10"), "10 10 10 10 10 10 10"),
    ]
    overfit(tmp_path / "model", pairs)
    data = tmp_path / "eval.jsonl"
    rows = [{"id": p.problem_id, "prompt": p.prompt, "answer": p.answer, "verifier": p.verifier} for p, _ in pairs]
    rows[2]["numbers"] = [3, 2, 1]  # type: ignore[assignment]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "evaluation.json"
    arguments = [str(tmp_path / "model"), "--data", str(data), "--samples", "2", "--temperature", "0.2"]
    assert tool.main([*arguments, "--max-response-tokens", "14", "--workers", "1", "--out", str(out)]) == 0
    result = load_evaluations(out)["evaluation"]
    assert [(row["id"], row["c"]) for row in result["problems"]] == [("a", 2), ("b", 2), ("c", 2), ("d", 0), ("e", 0)]
    assert result["metrics"]["maj@2"]["mean"] == result["metrics"]["pass@2"]["mean"] == 0.6
    assert result["response"]["truncated"]["mean"] == 0.2
    assert result["outcomes"] == {"correct": 0.6, "wrong": 0.2, "no_answer": 0.2}
    assert len(result["chat_template_sha256"]) == 64 and result["versions"]["math-verify"] == "0.9.0"
    two = ["--max-response-tokens", "14", "--workers", "1", "--limit", "2", "--label", "two", "--out", str(out)]
    assert tool.main([*arguments, *two]) == 0
    assert load_evaluations(out)["two"]["problems"] == result["problems"][:2]

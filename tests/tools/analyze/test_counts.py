"""pass@k, levels and flips of hand-made samples and evaluations against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import PromptConfig
from megatron_ext.metrics.eval_stats import pass_at_k
from tests.tools.analyze.inputs import BASE, analyze, write_counts, write_lines
from tests.tools.runs import evaluation
from tools.analyze.__main__ import main
from tools.analyze.counts import _of_samples
from tools.analyze.flips import mcnemar
from tools.analyze.inputs import labels_of, prompts_of, read_problems, read_samples
from tools.evaluate.fingerprint import header
from tools.evaluate.samples_file import SamplesFile
from tools.evaluate.settings import Settings


def test_pass_at_k_is_the_mean_over_problems(tmp_path: Path) -> None:
    counts = {"a": (6, 0), "b": (6, 2), "c": (7, 7)}
    samples = write_counts(tmp_path / "x.jsonl", counts)
    curve = analyze(tmp_path / "out", "pass-at-k", samples)["pass_at_k"]["eval"]["x"]
    assert list(curve) == ["1", "2", "4", "6"]  # powers of two, and the fewest responses of a problem
    for k, found in curve.items():
        expected = sum(pass_at_k(n, c, int(k)) for n, c in counts.values()) / 3
        assert found["mean"] == pytest.approx(expected, rel=1e-5)
        assert found["low"] <= found["mean"] <= found["high"]
    assert curve["2"]["mean"] == pytest.approx((0 + (1 - 4 * 3 / (6 * 5)) + 1) / 3, rel=1e-5)


def test_several_models_and_sets_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write_counts(folder / "one.jsonl", {"p": (4, 1)}, "one")
    write_counts(folder / "two.jsonl", {"p": (4, 4)}, "two")
    other = write_counts(tmp_path / "n.jsonl", {"p": (4, 2)}, "one")
    found = analyze(tmp_path / "out", "pass-at-k", folder, other, "--labels", "m", "n")["pass_at_k"]
    assert {name: {label: each["1"]["mean"] for label, each in curves.items()} for name, curves in found.items()} == {
        "one": {"m": 0.25, "n": 0.5},
        "two": {"m": 1.0},
    }


def test_levels_come_from_the_problems(tmp_path: Path) -> None:
    samples = write_counts(tmp_path / "x.jsonl", {"a": (4, 4), "b": (4, 0), "c": (4, 1)}, "math")
    levels = {"a": "1", "b": "10", "c": "10"}
    data = [{"id": name, "prompt": f"{name}?", "answer": "1", "level": level} for name, level in levels.items()]
    file = write_lines(tmp_path / "math.jsonl", data)
    found = analyze(tmp_path / "out", "levels", samples, "--data", file)
    assert found["by"] == "level"
    accuracy = found["accuracy"]["x"]
    assert {name: (each["problems"], each["mean"]) for name, each in accuracy.items()} == {
        "1": (1, 1.0),
        "10": (2, 0.125),
    }
    assert list(accuracy) == ["1", "10"]


def test_kinds_of_an_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"before": evaluation([1, 2]), "after": evaluation([4, 0])}))
    accuracy = analyze(tmp_path / "out", "levels", file)["accuracy"]
    assert {label: {name: each["mean"] for name, each in kinds.items()} for label, kinds in accuracy.items()} == {
        "before": {"even": 0.25, "odd": 0.5},
        "after": {"even": 1.0, "odd": 0.0},
    }


def test_a_suite_has_several_sets(tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    sets = {"one": evaluation([4, 4]), "two": evaluation([0, 2])}
    file.write_text(json.dumps({"suite": "x", "models": {"m": {"sets": sets, "average": []}}}))
    found = analyze(tmp_path / "out", "levels", file, "--by", "set")["accuracy"]["m"]
    assert {name: each["mean"] for name, each in found.items()} == {"one": 1.0, "two": 0.25}


def test_flips_are_the_problems_that_one_alone_solves(tmp_path: Path) -> None:
    first = {"a": (4, 4), "b": (4, 0), "c": (4, 2), "d": (4, 3), "only": (4, 4)}
    second = {"a": (4, 3), "b": (4, 4), "c": (4, 3), "d": (4, 1)}
    files = [write_counts(tmp_path / f"{name}.jsonl", counts) for name, counts in (("x", first), ("y", second))]
    found = analyze(tmp_path / "out", "flips", *files)
    assert found["solved_if"] == "half" and found["problems"] == 4 and found["not_paired"] == 1
    assert found["solved_by"] == {"both": 1, "first_only": 1, "second_only": 2, "neither": 0}
    assert [(each["id"], each["before"], each["after"]) for each in found["gained"]] == [
        ("b", "0/4", "4/4"),
        ("c", "2/4", "3/4"),
    ]
    assert [each["id"] for each in found["lost"]] == ["d"]
    assert found["accuracy_difference"]["mean"] == pytest.approx((11 - 9) / 16)
    any_right = analyze(tmp_path / "any", "flips", *files, "--solved", "any")
    assert any_right["solved_by"] == {"both": 3, "first_only": 0, "second_only": 1, "neither": 0}


def test_problems_that_read_otherwise_are_not_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two versions of a file whose problems are named by their line."""
    found = {label: evaluation([1, 2]) for label in ("before", "after")}
    found["after"]["problems"][1]["prompt"] = "another?"
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(found))
    assert main(["flips", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "problem 1 of set eval is another one to before ('1+1?') than to after" in capsys.readouterr().err


def test_problems_are_those_of_the_samples_sets(tmp_path: Path) -> None:
    """One set that no file is named after is that of the file that is no set's; two of them are nobody's."""

    def file(folder: str, name: str, level: str) -> str:
        row = {"id": "1", "prompt": f"{name}?", "answer": "1", "level": level}
        (tmp_path / folder).mkdir(exist_ok=True)
        return str(write_lines(tmp_path / folder / f"{name}.jsonl", [row]))

    def levels(*sets: str, data: list[str]) -> dict[str, list[str]]:
        samples = tmp_path / "-".join(sets)
        samples.mkdir(exist_ok=True)
        for name in sets:
            write_counts(samples / f"{name}.jsonl", {"1": (2, 1)}, name)
        counts = _of_samples(samples, "x", read_problems(list(map(Path, data))), None)
        return {row.set: [row.level, row.prompt] for row in counts.rows}

    aime, math, other = file("a", "aime", "hard"), file("a", "math", "5"), file("a", "other", "7")
    assert levels("aime", "math", data=[math]) == {"aime": ["", ""], "math": ["5", "math?"]}
    assert levels("aime", "math", data=[aime, math])["aime"] == ["hard", "aime?"]
    assert levels("aime", "math", data=[aime, other])["math"] == ["7", "other?"]
    assert levels("x", "y", data=[other]) == {"x": ["", ""], "y": ["", ""]}
    assert levels("x", data=[aime, math]) == {"x": ["", ""]}  # two problems have its id
    with pytest.raises(ConfigError, match="would both be the set 'math'; rename one of them"):
        read_problems([Path(math), Path(file("b", "math", "1"))])


def test_a_models_name_keeps_its_dots(tmp_path: Path) -> None:
    for name in ("Qwen2.5-1.5B", "Qwen2.5-Math-7B"):
        (tmp_path / name).mkdir()
    assert labels_of([tmp_path / "Qwen2.5-1.5B", tmp_path / "x.jsonl"], ()) == ["Qwen2.5-1.5B", "x"]


def test_flips_of_an_evaluation_go_by_the_majority(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"before": evaluation([2, 3]), "after": evaluation([3, 2])}))
    found = analyze(tmp_path / "out", "flips", file)
    assert found["solved_if"] == "majority"
    assert [each["id"] for each in found["gained"]] == ["0"] and found["gained"][0]["prompt"] == "0+1?"


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 1, 1.0), (5, 1, 2 * (1 + 6) / 64), (10, 0, 2 / 1024), (0, 3, 0.25)]
)
def test_mcnemar_counts_coins(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_the_samples_that_evaluate_writes_are_read(tmp_path: Path) -> None:
    settings = Settings(samples=2)
    prompt = PromptConfig(suffix=" Think.").model_dump()
    first = header(BASE, "sums", "0" * 64, settings, prompt, "hf")
    file = SamplesFile(tmp_path / "sums.jsonl", first)
    line = {"set": "sums", "id": "a", "text": "5", "response_ids": [3], "length": 1, "truncated": False}
    outcomes = ("correct", "wrong")
    file.append([line | {"sample": i, "outcome": each, "extracted": "5"} for i, each in enumerate(outcomes)])
    file.close()
    rows = read_samples(file.path)
    assert [(row.problem, row.sample) for row in rows] == [(("sums", "a"), 0), (("sums", "a"), 1)]
    assert [row.is_correct for row in rows] == [True, False]
    assert prompts_of(file.path)["sums"].suffix == " Think."

"""Two runs side by side; equal to the bit or the first metric that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.runs import evaluation, save_evaluations, step_metrics, write_run
from tools import compare_runs as tool
from tools.compare_runs import config_differences, evaluation_differences, first_difference, metric_rows
from tools.evaluate import save_evaluation
from tools.report.data import load_metrics


def test_equal_runs_are_equal_whatever_the_clock_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", time__rollout_s=99.0, speed__rollout_tokens_per_s=1.0, time__extra_s=1.0)
    assert tool.main([str(a), str(b), "--bitwise"]) == 0
    assert "equal to the bit: 6 steps" in capsys.readouterr().out


def test_one_bit_is_named_and_exit_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = write_run(tmp_path / "a")
    value = step_metrics(6)["entropy/full"]
    b = write_run(tmp_path / "b", entropy__full=value * (1 + 2**-52))
    assert tool.main([str(a), str(b), "--bitwise"]) == 1
    assert (
        f"not equal: step 6: entropy/full is {value!r} in A, {value * (1 + 2**-52)!r} in B" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("b", "found"),
    [
        ([{"step": 1, "x": 0.0}, {"step": 2, "x": None}], None),
        ([{"step": 1, "x": -0.0}, {"step": 2, "x": None}], "step 1: x is 0.0 in A, -0.0 in B"),
        ([{"step": 1, "x": 0}, {"step": 2, "x": None}], "step 1: x is 0.0 in A, 0 in B"),
        ([{"step": 1, "x": 0.0}, {"step": 2}], "step 2: x is only in A"),
        ([{"step": 1, "x": 0.0, "y": 1}, {"step": 2, "x": None}], "step 1: y is only in B"),
        ([{"step": 1, "x": 0.0}], "step 2 is only in A"),
        ([{"step": 1, "x": 0.0}, {"step": 2, "x": None}, {"step": 3}], "step 3 is only in B"),
        ([{"step": 2, "x": 0.0}], "step 1 in A stands where B has step 2"),
        ([{"step": 1, "x": 0.0}, {"step": 2, "x": 1.0}], "step 2: x is None in A, 1.0 in B"),
    ],
)
def test_the_first_difference(b: list[dict], found: str | None):
    assert first_difference([{"step": 1, "x": 0.0}, {"step": 2, "x": None}], b) == found


def test_what_only_one_run_validated_is_left_out() -> None:
    plain = [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.6}]
    validated = [{"step": 0, "validation/avg": 0.1}, plain[0], plain[1] | {"validation/avg": 0.2}]
    assert first_difference(plain, validated) is None and first_difference(validated, plain) is None
    other = [validated[0] | {"validation/avg": 0.3}, *validated[1:]]
    assert first_difference(validated, other) == "step 0: validation/avg is 0.1 in A, 0.3 in B"
    validated[2]["reward/mean"] = 0.7
    assert first_difference(plain, validated) == "step 2: reward/mean is 0.6 in A, 0.7 in B"


def test_configurations_differ_by_dotted_keys():
    a = {"name": "a", "method": {"name": "siren", "tau": 0.8}, "same": 1}
    b = {"name": "b", "method": {"name": "aer", "rho": 0.2}, "same": 1}
    assert config_differences(a, b) == {
        "name": ('"a"', '"b"'),
        "method.name": ('"siren"', '"aer"'),
        "method.tau": ("0.8", "(not set)"),
        "method.rho": ("(not set)", "0.2"),
    }


def test_metrics_side_by_side(tmp_path: Path):
    a, b = load_metrics(write_run(tmp_path / "a")), load_metrics(write_run(tmp_path / "b", reward__mean=0.2))
    rows = dict(metric_rows(a, b))
    assert rows["reward/mean"] == pytest.approx([0.6, 0.2])
    assert rows["reward/mean, best step"] == pytest.approx([0.6, 0.5])
    assert rows["time/step_s"] == [18, 18] and "kl/old" not in rows
    rows = dict(metric_rows(a, [{"step": 1}], b))
    assert rows["reward/mean"] == [pytest.approx(0.6), None, pytest.approx(0.2)]
    assert metric_rows(a, [{"step": 1}]) == [] == metric_rows([{"step": 1}], a)


def test_evaluations_are_paired_when_they_can_be(tmp_path: Path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert evaluation_differences(a, b) == ("", {})
    save_evaluations(a, after=[0, 1, 2], before=[4, 4, 4])
    save_evaluations(b, only=[4, 1, 4])
    what, pairs = evaluation_differences(a, b)
    assert "'after' of A against 'only' of B" in what
    assert pairs["avg@4"].interval.mean == pytest.approx(6 / 12)
    save_evaluation(b / "evaluation.json", "only", evaluation([4, 1, 4], "other"))
    what, pairs = evaluation_differences(a, b)
    assert not pairs and "no paired difference: the evaluations are of different data" in what


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b = write_run(tmp_path / "a<u>"), write_run(tmp_path / "b<u>")
    for folder, name in ((a, "<u>"), (b, "[/bold] <u>")):
        (folder / "config.json").write_text(json.dumps({"name": name, "hub": {"token": f"hunter2 {name}"}}))
    save_evaluations(a, after=[0, 1, 2])
    save_evaluations(b, after=[4, 4, 4])
    page = tmp_path / "compare.html"
    assert tool.main([str(a), str(b), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert '"[/bold] <u>"' in said and "reward/mean, best step" in said and "+75.0" in said
    html = page.read_text()
    assert html.count("&lt;u&gt;") == 2 * 3 + 2 and "<u" not in html  # names in title, heading and path; two settings
    assert "hunter2" not in html + said
    assert html.count("<figure") == len(step_metrics(1))
    assert tool.main([str(a), str(a)]) == 0
    assert "the configurations are the same" in capsys.readouterr().out
    assert tool.main([str(a), str(tmp_path)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


def test_what_begins_late_has_its_chart(tmp_path: Path):
    """As the policy's metrics, where a critic trains alone before."""
    a, b = (write_run(tmp_path / name, late__metric=0.5) for name in "ab")
    assert "late/metric" in tool.overlay([a, b])


def test_more_than_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "c", reward__mean=0.2)]
    for run, lr in zip(runs, (1, 1, 2), strict=True):
        (run / "config.json").write_text(json.dumps({"name": "same", "lr": lr}))
    save_evaluations(runs[0], after=[0, 1, 2])
    save_evaluations(runs[2], after=[4, 4, 4])
    page = tmp_path / "new" / "compare.html"
    assert tool.main([*map(str, runs), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert f"C is {runs[2]}" in "".join(said.splitlines())
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in said.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["lr"]] == ["1", "1", "2"]
    assert [cell.strip() for cell in rows["reward/mean"]] == ["0.6", "0.6", "0.2", "+0", "-0.4"]
    assert "of A against 'after' of C" in said and "of B" not in said
    html = page.read_text()
    assert html.count("<figure") == len(step_metrics(1)) and "<th>C</th>" in html and "a against b against c" in html

    assert tool.main([*map(str, runs), "--bitwise"]) == 1
    said = capsys.readouterr().out
    assert said == "not equal: step 6: reward/mean is 0.6000000000000001 in A, 0.2 in C\n"
    assert tool.main([*map(str, runs[:2]), str(runs[1]), "--bitwise"]) == 0
    assert tool.main([str(runs[0]), str(runs[2]), str(runs[1]), "--bitwise"]) == 1


@pytest.mark.parametrize("arguments", [["a"], ["a"] * 9, ["a", "b", "--bitwise", "--out", "x.html"]])
def test_what_cannot_be_compared(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        tool.main(arguments)
    assert caught.value.code == 2

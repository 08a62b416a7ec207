"""The command: everything that inputs allow, its messages, and input that it cannot use."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.tools.analyze.inputs import (
    BASE,
    DATA,
    record,
    row,
    write_counts,
    write_lines,
    write_recorded,
    write_samples,
)
from tests.tools.runs import evaluation, write_run
from tools.analyze.__main__ import _parser, main
from tools.analyze.everything import plan
from tools.analyze.registry import ANALYSES

RESPONSE = record(["It", " is", "2"], [0.0, 0.5, 1.0])


def test_all_does_what_a_run_and_a_model_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps({"before": evaluation([1, 2]), "after": evaluation([4, 0])}))
    samples, out = write_samples(tmp_path / "s.jsonl"), tmp_path / "out"
    arguments = [run, BASE, "--samples", samples, "--data", DATA, "--base", BASE, "--out", out]
    assert main(["all", *map(str, arguments)]) == 0
    assert "left out" not in capsys.readouterr().out
    export = run / "hf"  # where a run's own export is: given by itself it is the same model, not a second one
    shutil.copytree(BASE, export)
    twice = plan(
        _parser("all", None).parse_args([str(run), str(export), "--data", str(DATA), "--samples", str(samples)])
    )
    assert [(step.arguments or [])[:2] for step in twice if step.name == "first-tokens"] == [[str(export), "--out"]]
    assert {path.stem for path in out.glob("*.png")} == {*ANALYSES}
    page = (out / "index.html").read_text()
    assert all(f'src="{name}.png"' in page for name in ANALYSES)


def test_all_says_what_it_leaves_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_counts(tmp_path / "s.jsonl", {"a": (2, 1)})
    assert main(["all", str(samples), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "left out perplexity: needs --base, --samples and --data" in said
    assert "left out flips: flips: found 1 models" in said
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"pass-at-k", "levels"}
    assert "needs the folder of a run" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["entropy-histogram", "nowhere"], "nowhere is not there; expected a model"),
        (["entropy-histogram", BASE], "--samples: found none"),
        (["entropy-histogram", BASE, "--samples", "{samples}"], "--data: found none"),
        (["entropy-histogram", BASE, "--samples", "{empty}", "--data", DATA], "is empty, expected lines like"),
        (["entropy-histogram", BASE, "--samples", "{odd}", "--data", DATA], "line 2: text:"),
        (["entropy-histogram", BASE, "--samples", "{other}", "--data", DATA], "no problem nobody of set 'eval'"),
        (["entropy-histogram", BASE, "--samples", *["{samples}"] * 2, "--data", DATA], "found 2 for 1 models"),
        (["entropy-histogram", BASE, "--samples", "{silent}", "--data", DATA], "every response of"),
        (["entropy-histogram", "{run}", "--steps", "90-99"], "no response of steps 90-99"),
        (["tokens", "{run}", "--method", "siren"], "holds single responses of a step"),
        (["tokens", BASE, "--samples", "{samples}", "--data", DATA, "--method", "grpo"], "treats all tokens alike"),
        (["tokens", "{run}", "--method", "sirene"], "did you mean"),
        (["tokens", "{run}", "--method", "siren", "--method-option", "tau"], "expected key=value"),
        (["tokens", "{run}", "--method", "ppo"], "needs a critic"),
        (["perplexity", "{samples}", "--data", DATA], "--base: found None"),
        (["pass-at-k", BASE], "a model has no answers"),
        (["pass-at-k", "{unscored}"], "say neither correct nor outcome"),
        (["pass-at-k", "{twice}"], "sample 0 of problem a of set 'eval' is there twice"),
        (["flips", "{counts}", "{others}"], "have no problem in common"),
        (["flips", "{counts}"], "expected two"),
        (["levels", "{counts}", "--by", "level"], "no problem has a level"),
        (["entropy-accuracy", BASE], "expected the folder of a run"),
        (["entropy-accuracy", "{run}", "--accuracy", "reward/nothing"], "has no metric reward/nothing; it has reward/"),
        (["pivotal", "{run}"], "fewer than 5 pivotal words"),
        (["pass-at-k", "{counts}", "--labels", "a", "b"], "--labels: found a, b for 1 inputs"),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[-1:])) if isinstance(value, list) else "",
)
def test_bad_input_is_a_clear_error(
    tmp_path: Path, arguments: list, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "samples": write_samples(tmp_path / "samples.jsonl", 1),
        "empty": write_lines(tmp_path / "empty.jsonl", []),
        "odd": write_lines(tmp_path / "odd.jsonl", [row(0, 0, "1", True), {"set": "eval", "id": "tiny-eval-0"}]),
        "other": write_lines(tmp_path / "other.jsonl", [row(0, 0, "1", True, id="nobody")]),
        "silent": write_lines(tmp_path / "silent.jsonl", [row(0, 0, "", False)]),
        "unscored": write_lines(tmp_path / "unscored.jsonl", [row(0, 0, "1", None)]),
        "twice": write_lines(tmp_path / "twice.jsonl", [row(0, 0, "1", True, id="a")] * 2),
        "counts": write_counts(tmp_path / "counts.jsonl", {"a": (2, 1)}),
        "others": write_counts(tmp_path / "others.jsonl", {"b": (2, 1)}),
        "run": write_recorded(tmp_path / "run", [({"reward/mean": 0.5, "entropy/full": 1.0}, [RESPONSE])]),
    }
    given = [str(each).format(**files) for each in arguments]
    out = tmp_path / "out"
    assert main([*given, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith(f"analyze {given[0]}: ")
    assert not list(out.glob("*.png"))


def test_the_command_is_known_and_helps() -> None:
    command = [sys.executable, "-m", "tools.cli", "analyze"]
    done = warm.run([*command, "--help"])
    assert done.returncode == 0 and all(name in done.stdout for name in [*ANALYSES, "all"])
    wrong = warm.run([*command, "pass-at-n"])
    assert wrong.returncode == 2 and "did you mean pass-at-k?" in wrong.stderr


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"megatron-entropy analyze {name} " in capsys.readouterr().out

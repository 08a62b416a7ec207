"""The quickstart's commands are commands that its tools take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.train.method_factory import create_method
from megatron_ext.train.without_effect import without_effect
from tests.tools.runs import evaluation
from tools import quickstart
from tools.evaluate import command, save_evaluation


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_evaluation_takes_the_quickstarts_options(engine: str) -> None:
    tool, *arguments = quickstart.evaluate(quickstart.BASE, "before", Path("runs/quickstart"), engine)
    assert tool == "evaluate"
    rollout = command._rollout(command._parser().parse_args(arguments))
    assert (rollout.engine, rollout.enforce_eager) == (engine, engine == "vllm")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_every_key_that_training_is_given_is_read(engine: str) -> None:
    tool, recipe, *overrides = quickstart.train("quickstart", engine, ["train.steps=20"])
    config = load_config(recipe, overrides)
    assert (tool, config.rollout.engine, config.train.steps) == ("train", engine, 20)
    assert without_effect(config, create_method(config)) == []


@pytest.mark.parametrize(
    ("there", "left"),
    [
        ((), ["evaluate before", "train", "convert", "evaluate after"]),
        (("before",), ["train", "convert", "evaluate after"]),
        (("before", "hf"), ["train", "evaluate after"]),  # stopped while it evaluated the trained model
        (("before", "hf", "after"), []),
    ],
)
def test_a_second_call_goes_on_where_the_first_was_stopped(
    there: tuple[str, ...], left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, done = Path("runs/quickstart"), list[str]()
    run.mkdir(parents=True)

    def call(words: list[str]) -> SimpleNamespace:
        label = words[words.index("--label") + 1] if "--label" in words else ""
        done.append(f"{words[2].removeprefix('tools.')} {label}".strip())
        if label:
            save_evaluation(run / "evaluation.json", label, evaluation([1, 2]))
        return SimpleNamespace(returncode=0)

    for label in there:
        if label == "hf":
            (run / label).mkdir()
        else:
            save_evaluation(run / "evaluation.json", label, evaluation([1, 2]))
    monkeypatch.setattr(quickstart.subprocess, "run", call)
    monkeypatch.setattr("tools.report.page.write_report", lambda run: run / "report.html")
    monkeypatch.setattr(quickstart, "result", lambda run: "")
    assert quickstart.main([]) == 0 and done == left

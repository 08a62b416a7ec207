"""The quickstart's commands are commands that its tools take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import evaluate, quickstart


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_evaluation_takes_the_quickstarts_options(engine: str) -> None:
    tool, *arguments = quickstart.evaluate(quickstart.BASE, "before", Path("runs/quickstart"), engine)
    assert tool == "evaluate"
    rollout = evaluate._rollout(evaluate._parser().parse_args(arguments))
    assert (rollout.engine, rollout.enforce_eager) == (engine, engine == "vllm")

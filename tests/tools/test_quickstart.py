"""The quickstart's commands are commands that its tools take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import quickstart
from tools.evaluate import command


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_evaluation_takes_the_quickstarts_options(engine: str) -> None:
    tool, *arguments = quickstart.evaluate(quickstart.BASE, "before", Path("runs/quickstart"), engine)
    assert tool == "evaluate"
    rollout = command._rollout(command._parser().parse_args(arguments))
    assert (rollout.engine, rollout.enforce_eager) == (engine, engine == "vllm")

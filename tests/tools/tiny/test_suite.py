"""The tiny suite's sets are those that the tool makes of the held-out problems, each right for its set."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.shipped import RECIPES
from tools.tiny.suite import SETS, main, num_solutions
from tools.tiny.task import read


def test_the_shipped_sets_are_made_again(tmp_path: Path) -> None:
    assert main(["--data", str(RECIPES / "tiny/data/eval.jsonl"), "--out", str(tmp_path)]) == 0
    for name in SETS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (RECIPES / f"tiny/data/suite/{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", SETS)
def test_problems_fit_their_set(name: str) -> None:
    problems = read(RECIPES / f"tiny/data/suite/{name}.jsonl")
    assert 8 < len({problem.prompt for problem in problems}) == len(problems) <= 12
    for problem in problems:
        assert (problem.verifier == "math") == (name in ("sums", "fractions"))
        assert name != "small" or int(problem.answer) <= 20
        assert name != "rare" or num_solutions(problem) <= 2

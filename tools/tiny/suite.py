"""Six small sets for recipes/tiny/suite.toml, from the tiny task's held-out problems, with a kind and a level each.

    python -m tools.tiny.suite --out recipes/tiny/data/suite

``sums`` and ``fractions`` are the arithmetic, its level the number of operators; the others are countdowns of small and
of large targets, of equal numbers, and those with an only solution, their level how hard the solutions are to find: 3
for one or two of them, 2 for up to four, 1 for more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from megatron_ext.types import Problem

from .task import read, solutions

PROBLEMS = 12  # of a set, at most
FEW, SEVERAL = 2, 4  # solutions
NO_COLUMNS = ("problem_id", "in_thought")  # fields of a problem that its row does not have by that name


def level(problem: Problem) -> str:
    """How hard a problem is, from 1 on."""
    if problem.verifier != "countdown":
        return str(len(re.findall(r"[-+*]", problem.prompt)))
    count = num_solutions(problem)
    return "3" if count <= FEW else "2" if count <= SEVERAL else "1"


def num_solutions(problem: Problem) -> int:
    return len(solutions()[tuple(sorted(problem.numbers)), int(problem.answer)])


def is_countdown(problem: Problem) -> bool:
    return problem.verifier == "countdown"


SETS: dict[str, Callable[[Problem], bool]] = {  # in this order, each takes what those before left
    "sums": lambda p: not is_countdown(p) and "/" not in p.prompt,
    "fractions": lambda p: not is_countdown(p),
    "pairs": lambda p: len(set(p.numbers)) < len(p.numbers),
    "rare": lambda p: num_solutions(p) <= FEW,
    "small": lambda p: int(p.answer) <= 20,
    "large": lambda p: int(p.answer) > 20,
}


def split(problems: list[Problem]) -> dict[str, list[Problem]]:
    """``set -> its problems``, in the order of the data."""
    found: dict[str, list[Problem]] = {name: [] for name in SETS}
    for problem in problems:
        name = next(name for name, takes in SETS.items() if takes(problem))
        if len(found[name]) < PROBLEMS:
            found[name].append(replace(problem, kind=problem.verifier, level=level(problem)))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.suite", description="Write the tiny suite's sets.")
    parser.add_argument("--data", type=Path, default=Path("recipes/tiny/data/eval.jsonl"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("recipes/tiny/data/suite"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, problems in split(read(options.data)).items():
        rows = [{"id": p.problem_id} | {k: v for k, v in asdict(p).items() if k not in NO_COLUMNS} for p in problems]
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The promises about faults and bad input, the test that holds each, and the change that turns it red.

    python -m tests.reliability --write      docs/reliability.md anew from tests/reliability.toml

``tests/mutations.py`` makes the changes and sees the tests fail.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "tests" / "reliability.toml", ROOT / "docs" / "reliability.md"
HEAD = """# Faults and bad input: what is promised, and by which test

Written by `python -m tests.reliability --write` from [tests/reliability.toml](../tests/reliability.toml); a test keeps
the two alike. `python -m tests.mutations` makes each change of the last column in a copy of the tree and sees the
tests fail with it, and pass without it. F1 to F12 are what an attack tried; F3 is in 24, F6 in 12.
"""


class Mutation(BaseModel):
    """A change of one file that breaks a promise: ``old`` stands in it once. ``tests``: those that it turns red."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    change: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Case(BaseModel):
    """A promise. ``fault`` is what goes wrong, ``promise`` what happens then, ``tests`` are pytest's ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    fault: str
    promise: str
    tests: tuple[str, ...]
    mutation: tuple[Mutation, ...]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    case: tuple[Case, ...]


def load_cases() -> tuple[Case, ...]:
    """Raises pydantic's ValidationError for a field that is missing or unknown."""
    return Table.model_validate(tomllib.loads(SOURCE.read_text())).case


def page(cases: tuple[Case, ...]) -> str:
    rows = ["| | what goes wrong | what happens | tests | seen to fail when |", "|---|---|---|---|---|"]
    for case in cases:
        tests = "<br>".join(map(_link, case.tests))
        changes = "<br>".join(each.change for each in case.mutation)
        rows.append(f"| {case.id} | {case.fault} | {case.promise} | {tests} | {changes} |")
    return HEAD + "\n" + "\n".join(rows) + "\n"


def _link(test: str) -> str:
    file, name = test.split("::")
    return f"[{Path(file).stem.removeprefix('test_')}: {name.removeprefix('test_').replace('_', ' ')}](../{file})"


def find_test(test: str) -> ast.FunctionDef | None:
    """The function of a pytest id, parameters in brackets aside; None where there is none."""
    file, name = test.partition("[")[0].split("::")
    path = ROOT / file
    functions = ast.parse(path.read_text()).body if path.is_file() else []
    return next((each for each in functions if isinstance(each, ast.FunctionDef) and each.name == name), None)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)} instead of showing it")
    written = page(load_cases())
    if parser.parse_args().write:
        PAGE.write_text(written)
    else:
        print(written, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

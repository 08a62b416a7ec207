"""The table of promises is complete, its tests exist, its changes still fit the code, and its page is up to date."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutations import Outcome, fault_of, try_mutation
from tests.reliability import PAGE, ROOT, Case, Mutation, find_test, load_cases, page

CASES = load_cases()


def test_every_case_is_here_once() -> None:
    ids = [case.id for case in CASES]
    assert ids[:25] == [str(number) for number in range(1, 26)] and len(ids) == len(set(ids))


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(CASES), "run: python -m tests.reliability --write"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_promise_has_tests_that_run_and_a_change_that_one_of_them_sees(case: Case) -> None:
    assert case.tests and case.mutation
    for test in [*case.tests, *(test for mutation in case.mutation for test in mutation.tests)]:
        function = find_test(test)
        assert function is not None, f"there is no {test}"
        assert not re.search(r"\b(skip|skipif|importorskip)\b", ast.unparse(function)), f"{test} may be skipped"
    named = {test.partition("[")[0] for test in case.tests}
    assert all(test.partition("[")[0] in named for mutation in case.mutation for test in mutation.tests)


@pytest.mark.parametrize("mutation", [m for case in CASES for m in case.mutation], ids=lambda mutation: mutation.change)
def test_every_change_fits_the_code(mutation: Mutation) -> None:
    content = (ROOT / mutation.file).read_text()
    assert content.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r} is not in it once: mend the change"
    ast.parse(content.replace(mutation.old, mutation.new))
    assert mutation.tests and mutation.old != mutation.new


TESTED = """
import pytest
from code_under_test import double

@pytest.mark.parametrize("number", [0, 1])
def test_double(number):
    assert double(number) == 2 * number

def test_other():
    pass

def test_skipped():
    pytest.skip("not here")
"""
DOUBLE = "def double(number):\n    return 2 * number\n"


def tree_of(folder: Path) -> Path:
    (folder / "code_under_test.py").write_text(DOUBLE)
    (folder / "test_it.py").write_text(TESTED)
    return folder


def tried(tree: Path, old: str, new: str, *names: str) -> str:
    tests = tuple(f"test_it.py::{name}" for name in names)
    found, _ = try_mutation(tree, Mutation(change="", file="code_under_test.py", old=old, new=new, tests=tests))
    assert (tree / "code_under_test.py").read_text() == DOUBLE
    return "\n".join(found)


def test_a_change_that_no_test_sees_is_told(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    names = ("test_double", "test_double[0]", "test_double[1]", "test_other", "test_skipped")
    assert tried(tree, "2 * number", "3 * number", *names).splitlines() == [
        "test_it.py::test_double[0] stays passed",
        "test_it.py::test_other stays passed",
        "test_it.py::test_skipped stays skipped",
    ]
    assert "found 2 times, expected once" in tried(tree, "number", "numbers", "test_double")


@pytest.mark.parametrize(
    ("old", "new", "fault"), [("2 *", "twice *", "fails by accident"), ("def double", "def d", "did not run")]
)
def test_code_that_cannot_run_is_no_proof(old: str, new: str, fault: str, tmp_path: Path) -> None:
    assert fault in tried(tree_of(tmp_path), old, new, "test_double")


def test_a_test_that_fails_or_is_skipped_without_the_change_proves_nothing() -> None:
    for status in ("failed", "error", "skipped"):
        outcomes = {"a::b[0]": Outcome("passed", ""), "a::b[1]": Outcome(status, "said")}
        assert fault_of("a::b", outcomes, broken=False) == f"without the change: a::b[1]: {status}\nsaid"
        assert fault_of("a::b[0]", outcomes, broken=False) is None
    assert fault_of("a::b", {"a::bc": Outcome("passed", "")}, broken=False) == "a::b did not run"

"""The table of promises is complete, its tests exist, its changes still fit the code, and its page is up to date."""

from __future__ import annotations

import ast
import re

import pytest

from tests.reliability import PAGE, ROOT, Case, find_test, load_cases, page

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
def test_every_change_fits_the_code(mutation) -> None:
    content = (ROOT / mutation.file).read_text()
    assert content.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r} is not in it once: mend the change"
    ast.parse(content.replace(mutation.old, mutation.new))
    assert mutation.tests and mutation.old != mutation.new

"""Break the code on purpose, one small change at a time, and see that the tests named for it fail.

    python -m tests.mutations            every change of tests/reliability.toml
    python -m tests.mutations 9 F4       those of some cases

All happens in a copy of the tree. The tests must pass in it as it is; with the change, each of them must fail by what
it asserts or by what the code raises, not by code that cannot be imported. What a broken launcher leaves behind is
ended with it. Tests below tests/vllm run in ``.venv-vllm``, the others in the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.reliability import ROOT, Case, Mutation, load_cases

TIMEOUT_S = 300  # for one test
BY_ACCIDENT = re.compile(r"\b(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError)\b")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_SECONDS = itertools.count(int(time.time()) + 1)


@dataclass(frozen=True)
class Outcome:
    """How one test ended: ``passed``, ``failed``, ``error`` (outside of the test) or ``skipped``; and what it said."""

    status: str
    said: str


def copy_tree(target: Path) -> None:
    """Every file that git knows or would take, as it is now, and the environments."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for name in (".venv", ".venv-vllm"):
        if (ROOT / name).exists():
            (target / name).symlink_to((ROOT / name).resolve())


def run_tests(tree: Path, tests: Iterable[str]) -> dict[str, Outcome]:
    """Each test function or parametrisation that pytest ran, by its id."""
    found: dict[str, Outcome] = {}
    chosen = sorted(set(tests))
    for interpreter, part in (
        (sys.executable, [test for test in chosen if not test.startswith("tests/vllm/")]),
        (str(ROOT / ".venv-vllm" / "bin" / "python"), [test for test in chosen if test.startswith("tests/vllm/")]),
    ):
        if part:
            found |= _run(tree, interpreter, part)
    return found


def _run(tree: Path, interpreter: str, tests: list[str]) -> dict[str, Outcome]:
    report = tree / "outcomes.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-p", "pytest_timeout", f"--timeout={TIMEOUT_S}", f"--junitxml={report}"]  # other plugins start slowly
    command = [interpreter, "-m", "pytest", *options, *tests]
    others = _children()
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    _end(_children() - others)
    if not report.is_file():
        raise SystemExit(f"pytest made no report:\n{done.stdout}{done.stderr}")
    return dict(_outcome(each) for each in ET.parse(report).iter("testcase"))


def _outcome(case: ET.Element) -> tuple[str, Outcome]:
    test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
    for tag, status in (("error", "error"), ("failure", "failed"), ("skipped", "skipped")):
        if (ending := case.find(tag)) is not None:
            return test, Outcome(status, f"{ending.get('message')}\n{ending.text}")
    return test, Outcome("passed", "")


def _children() -> set[psutil.Process]:
    """Those whose parents are gone too (``main`` asked for them)."""
    return set(psutil.Process().children(recursive=True))


def _end(left: set[psutil.Process]) -> None:
    for each in left:
        each.kill()
    psutil.wait_procs(left, timeout=10)


def fault_of(test: str, outcomes: dict[str, Outcome], *, broken: bool) -> str | None:
    """What is not as it should be with a named test, every parametrisation of it; None if all is."""
    own = {each: outcome for each, outcome in outcomes.items() if each == test or each.startswith(f"{test}[")}
    if not own:
        return f"{test} did not run"
    if not broken:
        bad = next((f"{each}: {o.status}\n{o.said}" for each, o in own.items() if o.status != "passed"), None)
        return None if bad is None else f"without the change: {bad}"
    failed = [outcome for outcome in own.values() if outcome.status == "failed"]
    if not failed:
        return f"{test} stays {'/'.join(sorted({o.status for o in own.values()}))}"
    if all(BY_ACCIDENT.search(outcome.said) for outcome in failed):
        return f"{test} fails by accident: {failed[0].said}"
    return None


def try_mutation(tree: Path, mutation: Mutation) -> tuple[list[str], dict[str, Outcome]]:
    """The faults, none if every test turned red; and how the tests ended."""
    file = tree / mutation.file
    content = file.read_text()
    if content.count(mutation.old) != 1:
        return [f"{mutation.file}: found {content.count(mutation.old)} times, expected once: {mutation.old!r}"], {}
    _write(file, content.replace(mutation.old, mutation.new))
    try:
        outcomes = run_tests(tree, mutation.tests)
    finally:
        _write(file, content)
    return [fault for test in mutation.tests if (fault := fault_of(test, outcomes, broken=True))], outcomes


def _write(file: Path, content: str) -> None:
    """Python knows its bytecode by the second of the file's change and its length: no two contents share one."""
    file.write_text(content)
    second = next(_SECONDS)
    os.utime(file, (second, second))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help="numbers of cases (default: all)")
    parser.add_argument("--why", action="store_true", help="show by what each test failed")
    options = parser.parse_args()
    cases = load_cases()
    if unknown := set(options.cases) - {case.id for case in cases}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(case.id for case in cases)}")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    chosen = [case for case in cases if not options.cases or case.id in options.cases]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy_tree(Path(folder))
        return _try_all(Path(folder), chosen, why=options.why)


def _try_all(tree: Path, cases: list[Case], *, why: bool) -> int:
    """The exit code: 1 if any test did not do as it should."""
    tests = {test for case in cases for mutation in case.mutation for test in mutation.tests}
    print(f"{len(tests)} tests without a change ...", flush=True)
    outcomes = run_tests(tree, tests)
    faults = [fault for test in sorted(tests) if (fault := fault_of(test, outcomes, broken=False))]
    rows = []
    for case in cases:
        for mutation in case.mutation:
            start = time.monotonic()
            found, endings = try_mutation(tree, mutation)
            faults += [f"case {case.id}: {mutation.change}: {fault}" for fault in found]
            rows.append((case.id, "NOT SEEN" if found else "seen", mutation.change))
            print(
                f"{time.monotonic() - start:6.1f} s  case {case.id:>3}  {rows[-1][1]:8}  {mutation.change}", flush=True
            )
            for test, ending in endings.items() if why else ():
                print(f"          {test}: {ending.status}: {ending.said.strip().splitlines()[:1]}")
    print("\n" + "\n".join(f"{number:>4}  {seen:8}  {change}" for number, seen, change in rows))
    print(f"\n{sum(row[1] == 'seen' for row in rows)} of {len(rows)} changes turn their tests red", flush=True)
    for fault in faults:
        print(f"\n{fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

"""The tiny task as every public set: each goes the way of the real one, by the command that --list prints for it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import parquet

from megatron_ext.config.public_sets import public_sets
from megatron_ext.config.shipped import RECIPES
from megatron_ext.data.dataset import load_problems
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.types import Problem
from tests.tools.data.conftest import Rows, Run, manifest, read, write
from tools.tiny import task
from tools.tiny.public_rows import CONTEXT, expression
from tools.tiny.public_sets import LAYOUTS, PLANTED_FROM, PLANTED_IN, deal, main

DATA = RECIPES / "tiny" / "data"
SETS = {name: found for name, found in public_sets().items() if not found.parts}
EVALUATION = [name for name, found in SETS.items() if found.use == "evaluation"]
NUM_ROWS = {"training": 128, "evaluation": 12}
MAX_BYTES = 300_000
Prepare = Callable[..., Rows]


@pytest.fixture(scope="module")
def tiny() -> dict[str, Problem]:
    """``prompt -> problem``, of training and held-out problems."""
    return {each.prompt: each for name in ("train", "eval") for each in task.read(DATA / f"{name}.jsonl")}


@pytest.fixture
def prepare(run: Run, tmp_path: Path) -> Prepare:
    """``prepare(name, *options)``: as a user who downloaded the set; the rows that it wrote."""
    shutil.copytree(DATA / "public", tmp_path / "data" / "hub")

    def call(name: str, *options: object) -> Rows:
        command = shlex.split(public_sets()[name].commands()[-1])
        assert command[:2] == ["megatron-entropy", "data"]
        assert run(*command[2:], *options) == 0
        return read(tmp_path / "data" / f"{name}.jsonl")

    return call


def test_the_shipped_files_are_made_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["--data", str(DATA), "--out", str(tmp_path / name)]) == 0
    first, second, shipped = (
        {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "a", tmp_path / "b", DATA / "public")
    )
    assert set(first) == set(second) == set(shipped)
    assert sum(path.stat().st_size for path in shipped.values()) < MAX_BYTES
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
        if path.suffix == ".parquet":  # whose bytes name the version of the library, too
            assert parquet.read_table(path).equals(parquet.read_table(shipped[name]), check_metadata=True), name
        else:
            assert path.read_bytes() == shipped[name].read_bytes(), name


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_prepared_as_the_real_one(
    name: str, prepare: Prepare, pool: RewardPool, tiny: dict[str, Problem]
) -> None:
    """What comes out are the tiny task's prompts and numbers, and the verifier takes a solution for the number."""
    rows = prepare(name)
    planted = name == PLANTED_IN
    use = SETS[name].use
    assert len(rows) == NUM_ROWS[use] + planted
    problems, report = load_problems(Path(f"data/{name}.jsonl"), score=pool.score, strict=True)
    assert len(problems) == len(rows) and not report.faults and not report.num_renamed
    of = [tiny[each.prompt.partition("\n\n")[0].removeprefix(f"{CONTEXT}\n")] for each in problems]
    held_out = [each.problem_id.startswith("tiny-eval") for each in of]
    assert sum(held_out) == (planted if use == "training" else len(of)) and len(set(of)) == len(of)
    if name == "gpqa":
        for each, source in zip(problems, of, strict=True):
            assert each.verifier == "choice" and f"\n{each.answer}. {source.answer}" in f"{each.prompt}\n"
            assert each.prompt.count("\n") == 5
        return
    assert [each.answer for each in problems] == [source.answer for source in of]
    solved = [(each, rf"\boxed{{{expression(source)}}}") for each, source in zip(problems, of, strict=True)]
    assert {reward.outcome for reward in pool.score(solved)} == {"correct"}


def test_every_set_is_there_and_no_problem_is_in_two() -> None:
    dealt = deal(task.read(DATA / "train.jsonl"), task.read(DATA / "eval.jsonl"))
    names = [each.problem_id for problems in dealt.values() for each in problems]
    assert set(LAYOUTS) == set(SETS) == {path.name for path in (DATA / "public").iterdir()}
    assert len(names) == len(set(names)) + 1


def test_kinds_and_levels_come_along(prepare: Prepare) -> None:
    found = {name: {(row["kind"], row["level"]) for row in prepare(name)} for name in ("math", "math500", "omni-math")}
    assert {kind for pairs in found.values() for kind, _ in pairs} == {"Number Theory", "Prealgebra"}
    assert {level for _, level in found["math"]} == {"1", "2", "3"}
    assert {level for _, level in found["omni-math"]} <= {"1.5", "2.5", "3.5"}


def test_the_planted_problem_is_left_out(prepare: Prepare, capsys: pytest.CaptureFixture) -> None:
    prepared = {name: prepare(name) for name in EVALUATION}
    planted = prepared[PLANTED_FROM][0]
    against = ("--against", *(f"data/{name}.jsonl" for name in EVALUATION))
    capsys.readouterr()
    rows = prepare(PLANTED_IN, *against)
    told = capsys.readouterr().out
    assert len(rows) == NUM_ROWS["training"] and planted["prompt"] not in {row["prompt"] for row in rows}
    record = manifest(Path(f"data/{PLANTED_IN}.jsonl"))
    assert record["left_out"] == {"duplicate": 2 * 129, "in_evaluation_set": 1}
    [overlap] = record["overlaps"]
    assert f"of {PLANTED_FROM} {planted['id']}: " in overlap["match"]
    assert f"left out, in_evaluation_set: 1\n  {PLANTED_IN} row 65: " in told
    for name in SETS:
        if SETS[name].use == "training" and name != PLANTED_IN:
            assert len(prepare(name, *against)) == NUM_ROWS["training"]


@pytest.mark.parametrize(("name", "kept"), [("siren-llama-35k", range(1, 9)), ("entropic-math", range(1, 8))])
def test_mixtures_are_made_of_their_parts(name: str, kept: range, prepare: Prepare, run: Run, pool: RewardPool) -> None:
    """Every ninth problem has as many right responses of 8: none, one, ... all."""
    parts = [row for part in public_sets()[name].parts for row in prepare(part)]
    right = {row["id"]: number % 9 for number, row in enumerate(parts)}
    samples = [
        {"id": each, "sample": i, "text": "", "correct": i < count} for each, count in right.items() for i in range(8)
    ]
    command = shlex.split(public_sets()[name].commands()[-1])
    [file] = [each for each in command if each.startswith("samples-of")]
    write(Path(file), samples)
    assert run(*command[2:]) == 0
    rows = read(Path(f"data/{name}.jsonl"))
    assert [row["id"] for row in rows] == [each for each, count in right.items() if count in kept]
    problems, report = load_problems(Path(f"data/{name}.jsonl"), score=pool.score, strict=True)
    assert len(problems) == len(rows) and not report.faults

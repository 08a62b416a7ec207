"""Ranks of real runs at TP 2 that hang, each in its own way: named, shown, ended, and the run goes on bitwise."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.train import test_run

HOOK = Path(__file__).parent / "hanging"
STEPS = ("train.steps=3", "checkpoint.every=1", "train.hang_minutes=0.3")


def train(folder: Path, how: str = "", rank: int = 1) -> tuple[int, str]:
    """Exit code and output of a run whose rank hangs in its third step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipe, said = folder / "pipe", folder / "said"
    if how:
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        paths = os.pathsep.join([str(HOOK), os.environ.get("PYTHONPATH", "")])
        environment |= {"PYTHONPATH": paths, "HANG": how, "HANG_RANK": str(rank), "HANG_STEP": "3"}
        environment |= {"HANG_PIPE": str(pipe)}
    command = test_run.command(folder, *STEPS)
    with said.open("w") as output:
        done = subprocess.run(
            command, cwd=test_run.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=600
        )
    if how == "wait_in_kernel":
        pipe.write_text("\n")  # its child goes on, which is not of the product's making
    return done.returncode, said.read_text()


def left_behind(folder: Path) -> list[str]:
    """Processes that have the run's folder among their arguments, after a moment."""
    time.sleep(1)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in arguments:
            found.append(arguments)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    code, output = train(folder)
    assert code == 0, output
    return folder


@pytest.mark.parametrize(
    ("how", "named", "stack"),
    [
        ("stop", r"has been stopped for 1\d s \(SIGSTOP\)", "in stop"),
        ("spin", r"has worked for \d\d s without a sign of progress", "in spin"),
        ("hold_interpreter", r"has not answered for 1\d s: one of its calls lets no other", "in hold_interpreter"),
        ("wait_in_kernel", r"has not answered for 1\d s: it waits for a device or a file system", "in wait_in_kernel"),
        ("deaf", r"has worked for \d\d s without a sign of progress", "in deaf"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    how: str, named: str, stack: str, uninterrupted: Path, tmp_path: Path
) -> None:
    code, output = train(tmp_path, how)
    assert code == 77, output
    assert re.search(rf"^ranks: rank 1 \(process \d+\) in update of step 3 {named}", output, re.MULTILINE), output
    assert len(re.findall(r"(?:without a sign|has not answered|has been stopped)", output)) == 1, output
    assert re.search(r"^ranks: rank 0 \(process \d+\) in update of step 3 waits for other ranks", output, re.MULTILINE)
    shown = re.search(r"^ranks: rank 1 \(process \d+\): its Python stacks\n((?:    .*\n)+)", output, re.MULTILINE)
    assert shown is not None and stack in shown[1] and "in update" in shown[1], output
    shown = re.search(r"^ranks: rank 0 \(process \d+\): its Python stacks\n((?:    .*\n)+)", output, re.MULTILINE)
    assert shown is not None and "distributed_c10d.py" in shown[1], output
    assert "Traceback" not in output
    assert left_behind(tmp_path) == []
    code, output = train(tmp_path)
    assert code == 0 and re.search(r"resuming after step [12] of 3", output), output
    assert test_run.metrics(tmp_path) == test_run.metrics(uninterrupted)
    assert test_run.contents(tmp_path, 3) == test_run.contents(uninterrupted, 3)


def test_ranks_that_wait_for_each_other_are_named_with_their_places(tmp_path: Path) -> None:
    code, output = train(tmp_path, "alone_in_a_collective")
    assert code == 77, output
    for rank, place in ((0, "between two phases"), (1, r"\w+")):
        said = rf"^ranks: rank {rank} \(process \d+\) in {place} of step 3 has waited for \d+ s for ranks that all wait"
        assert re.search(said, output, re.MULTILINE), output
    assert "in barrier" in output and "Traceback" not in output
    assert left_behind(tmp_path) == []


def test_a_rank_that_is_slow_to_score_is_no_fault(uninterrupted: Path, tmp_path: Path) -> None:
    """For three times as long as a rank may leave its launcher without an answer; the data's gold answers, too."""
    code, output = train(tmp_path, "slow_to_score", rank=0)
    assert code == 0, output
    assert test_run.metrics(tmp_path) == test_run.metrics(uninterrupted)

"""Ranks of real runs at TP 2 that hang, each in its own way: named, shown, ended, and the run goes on bitwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests import warm
from tests.train import test_run
from tools.ranks import free_port

HOOK = Path(__file__).parent / "hanging"
STEPS = ("train.steps=3", "checkpoint.every=1", "train.hang_minutes=0.3")


def environment(folder: Path, how: str, rank: int) -> dict[str, str]:
    """In which ``rank`` of a run hangs in the third step; ``how`` empty: none does."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if not how:
        return common
    (folder / "pipe").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe")
    hook = {"HANG": how, "HANG_RANK": str(rank), "HANG_STEP": "3", "HANG_PIPE": str(folder / "pipe")}
    return common | hook | {"PYTHONPATH": os.pathsep.join([str(HOOK), os.environ.get("PYTHONPATH", "")])}


def start(command: Sequence[str], said: Path, environment: dict[str, str]) -> subprocess.Popen:
    with said.open("w") as output:
        return warm.popen(
            command,
            cwd=test_run.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def train(folder: Path, how: str = "", *overrides: str, rank: int = 1) -> tuple[int, str]:
    """Exit code and output."""
    command = test_run.command(folder, *STEPS, *overrides)
    code = start(command, folder / "said", environment(folder, how, rank)).wait(900)
    if how == "wait_in_kernel":
        (folder / "pipe").write_text("\n")  # its child goes on, which is not of the product's making
    return code, (folder / "said").read_text()


def left_behind(folder: Path) -> list[int]:
    """Processes whose standard error is a file of the folder, as that of all of the run's is, after a moment."""
    time.sleep(1)
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if str(folder) in os.readlink(f"/proc/{pid}/fd/2"):
                found.append(int(pid))
    return found


def test_what_is_left_behind_is_found(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said:
        left = subprocess.Popen(["sleep", "60"], stderr=said)
    assert left_behind(tmp_path) == [left.pid]
    left.kill()
    left.wait()
    assert left_behind(tmp_path) == []


WAYS = {  # what is said of the rank
    "hold_interpreter": r"has not answered for \d+ s: one of its calls lets no other Python thread run",
    "wait_in_kernel": r"has not answered for \d+ s: it waits for a device or a file system",
    "spin": r"has worked for \d+ s without a sign of progress",
    "deaf": r"has worked for \d+ s without a sign of progress",
    "stop": r"has been stopped for \d+ s \(SIGSTOP\)",  # last: it goes on for a moment, to answer
}


def stacks(rank: int, output: str) -> str:
    found = re.search(rf"^ranks: rank {rank} \(process \d+\): its Python stacks\n((?:    .*\n)+)", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


@pytest.mark.timeout(1800)  # seven runs; on a machine that is busy otherwise each takes minutes
def test_ranks_that_hang_are_named_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    for how, fault in WAYS.items():
        code, output = train(tmp_path, how)
        assert code == 77, output
        assert re.search(rf"^ranks: rank 1 \(process \d+\) in update of step 3 {fault}", output, re.MULTILINE), output
        assert len(re.findall(r"has worked|has not answered|has been stopped|has waited", output)) == 1, output
        waits = r"^ranks: rank 0 \(process \d+\) in update of step 3 waits for other ranks"
        assert re.search(waits, output, re.MULTILINE), output
        if how != "stop":  # one that was stopped goes on while it answers, and lets the others on
            assert f" in {how}\n" in stacks(1, output), output
            assert "distributed_c10d.py" in stacks(0, output), output
            assert "Traceback" not in output
        assert left_behind(tmp_path) == []
    (tmp_path / "whole").mkdir()
    for folder, resumed in ((tmp_path, True), (tmp_path / "whole", False)):
        code, output = train(folder)
        assert code == 0 and bool(re.search(r"resuming after step \d of 3", output)) == resumed, output
    assert test_run.metrics(tmp_path) == test_run.metrics(tmp_path / "whole")
    assert test_run.contents(tmp_path, 3) == test_run.contents(tmp_path / "whole", 3)


def test_ranks_that_wait_for_each_other_are_named_with_their_places(tmp_path: Path) -> None:
    code, output = train(tmp_path, "alone_in_a_collective")
    assert code == 77, output
    for rank, place in ((0, "between two phases"), (1, r"\w+")):
        said = rf"^ranks: rank {rank} \(process \d+\) in {place} of step 3 has waited for \d+ s for ranks that all wait"
        assert re.search(said, output, re.MULTILINE), output
    assert " in barrier\n" in stacks(0, output) and "Traceback" not in output
    assert left_behind(tmp_path) == []


def test_the_launcher_of_its_node_names_a_rank_and_the_other_nodes_blames_nobody(tmp_path: Path) -> None:
    _, _, module, recipe, *settings = test_run.command(
        tmp_path, *STEPS, "parallel.nodes=2", "parallel.ranks_per_node=1"
    )
    at = ["--nodes", "2", "--ranks-per-node", "1", "--master", f"127.0.0.1:{free_port()}"]
    nodes = [
        start(
            [sys.executable, "-m", "tools.ranks", *at, "--node", str(node), module, recipe, *settings],
            tmp_path / f"said{node}",
            environment(tmp_path, "spin", rank=1),
        )
        for node in (0, 1)
    ]
    codes = [node.wait(900) for node in nodes]
    first, second = ((tmp_path / f"said{node}").read_text() for node in (0, 1))
    assert codes[1] == 77 and codes[0] not in (0, 75, 77), first + second
    assert re.search(r"^ranks: rank 1 \(process \d+\) in update of step 3 has worked for \d+ s", second, re.MULTILINE)
    assert "ranks: rank 0 ended with exit code 1\n" in first and "ranks: rank 0 (" not in first, first
    assert left_behind(tmp_path) == []


def test_a_rank_that_is_slow_to_score_is_no_fault(tmp_path: Path) -> None:
    """For longer than a rank may leave its launcher without an answer, while the other one waits for it."""
    code, output = train(tmp_path, "slow_to_score", "train.steps=1", "train.hang_minutes=15", rank=0)
    assert code == 0 and output.count("slow to score") == 2, output

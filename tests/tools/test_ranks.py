"""The launcher of one node: environments, exit codes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(folder: Path, program: str, *options: str, **environment: str) -> subprocess.Popen:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "tools.ranks", "--ranks-per-node", "2", *options, "program", str(folder)]
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths, **environment})


def wait_for(folder: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < count and time.monotonic() < deadline:
        time.sleep(0.05)


SAY = """
import os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
open(f"{sys.argv[1]}/rank{os.environ['RANK']}", "w").write(" ".join(os.environ[name] for name in names))
"""


def test_each_node_starts_its_ranks_with_their_numbers(tmp_path: Path) -> None:
    for node in ("0", "1"):
        options = ("--nodes", "2", "--master", "head:1234")
        assert launch(tmp_path, SAY, *options, SLURM_NODEID=node).wait() == 0
    found = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    assert found == [f"{rank} {rank % 2} 4 head 1234" for rank in range(4)]


BOUND = """
import os, sys, threading
found = []
thread = threading.Thread(target=lambda: found.append(sorted(os.sched_getaffinity(0))))  # of a thread, as torch's
thread.start(); thread.join()
open(f"{sys.argv[1]}/cpus{os.environ['RANK']}", "w").write(str(found[0]))
"""
SMI = """#!/bin/sh
echo "0, GPU-aaaa-1, 00000000:1B:00.0"
echo "1, GPU-bbbb-2, 00000000:C3:00.0"
"""


@pytest.mark.parametrize(
    ("visible", "option", "near"),
    [
        (None, "node", ("first", "last")),
        ("1,0", "node", ("last", "first")),
        ("GPU-bbbb,GPU-aaaa-1", "node", ("last", "first")),
        (None, "none", ("all", "all")),
        ("0,7", "node", ("all", "all")),  # not listed: said, and nobody is bound
    ],
)
def test_a_rank_runs_on_the_cpus_near_its_gpu(
    visible: str | None, option: str, near: tuple[str, str], tmp_path: Path
) -> None:
    """The real launcher and the real affinity of its ranks; nvidia-smi and the kernel's list are made up."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU: nothing to choose from")
    places = {"first": cpus[:1], "last": cpus[-1:], "all": cpus}
    for name, listed in (("0000:1b:00.0", f"{cpus[0]}"), ("0000:c3:00.0", f"{cpus[-1]}-{cpus[-1]},9000-9001")):
        (tmp_path / "pci" / name).mkdir(parents=True)
        (tmp_path / "pci" / name / "local_cpulist").write_text(listed + "\n")
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "program.py").write_text(BOUND)
    code = f"import pathlib; from tools import numa, ranks; numa.PCI_DEVICES = pathlib.Path({str(tmp_path / 'pci')!r})"
    arguments = ["--ranks-per-node", "2", "--numa-binding", option, "program", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", f"{code}; raise SystemExit(ranks.main({arguments!r}))"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"cpus{rank}").read_text() for rank in (0, 1)] == [str(places[name]) for name in near]
    assert ("bound to no CPUs: CUDA_VISIBLE_DEVICES names '7'" in done.stderr) == (visible == "0,7")


def test_without_gpus_the_launcher_says_that_nobody_is_bound(tmp_path: Path) -> None:
    launcher = launch(tmp_path, SAY, "--numa-binding", "node", PATH="/nowhere")
    assert launcher.wait() == 0 and (tmp_path / "rank1").exists()


@pytest.mark.parametrize("code", [2, 3, 75])
def test_the_exit_code_is_the_ranks(tmp_path: Path, code: int) -> None:
    assert launch(tmp_path, f"raise SystemExit({code})").wait() == code


def test_a_failing_rank_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    program = "import os, time\nif os.environ['RANK'] == '1': raise SystemExit(7)\ntime.sleep(60)"
    assert launch(tmp_path, program).wait() == 7
    assert time.monotonic() - start < 30


def test_a_signal_reaches_every_rank(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
def stop(*_):
    open(f"{sys.argv[1]}/stopped{os.environ['RANK']}", "w")
    raise SystemExit(75)
signal.signal(signal.SIGUSR1, stop)
open(f"{sys.argv[1]}/ready{os.environ['RANK']}", "w")
time.sleep(60)
"""
    process = launch(tmp_path, program)
    wait_for(tmp_path, "ready*", 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    assert len(list(tmp_path.glob("stopped*"))) == 2


def test_a_signal_that_comes_before_a_rank_listens_is_not_lost(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
open(f"{sys.argv[1]}/loading{os.environ['RANK']}", "w")
time.sleep(0.5)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
time.sleep(60)
"""
    process = launch(tmp_path, program)
    wait_for(tmp_path, "loading*", 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75


def test_several_nodes_need_an_address(tmp_path: Path) -> None:
    assert launch(tmp_path, "", "--nodes", "2").wait() == 2

"""A warm process is what a fresh one would have been: streams, environment, directory, signals, codes, descendants."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext.rollout.rewards import worker_pool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.rollout.rewards.worker import MAX_WORKER_BYTES
from megatron_ext.types import Problem
from tests import warm
from tests.warm import process

RECIPES = [sys.executable, "-m", "tools.recipes", "siren-tiny*"]
TOLD = """
import json, os, signal, sys
json.dump(
    {
        "argv": sys.argv[1:], "cwd": os.getcwd(), "variable": os.environ["VARIABLE"], "others": len(os.environ),
        "ignored": [n for n in range(1, 32) if n not in (9, 19) and signal.getsignal(n) == signal.SIG_IGN],
        "group": os.getpgid(0) == os.getpid(), "parent": os.getppid() == int(sys.argv[1]),
        "descriptors": [n for n in range(3, 100) if os.path.exists(f"/proc/self/fd/{n}")],
    },
    sys.stdout,
)
sys.exit(3)
"""
SLEEPER = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("up")
time.sleep(600)
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(warm.ROOT), str(folder)]), **more}


def test_a_command_says_and_ends_as_a_fresh_one() -> None:
    fresh = subprocess.run(RECIPES, cwd=warm.ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = warm.run(RECIPES, cwd=warm.ROOT)
    assert (found.returncode, found.stdout, found.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert found.returncode == 0 and "siren-tiny-cpu" in found.stdout
    wrong = warm.run([sys.executable, "-m", "tools.train", "no such recipe"], cwd=warm.ROOT)
    assert wrong.returncode == 2 and wrong.stderr and not wrong.stdout


def test_a_module_that_is_missing_and_one_that_raises(tmp_path: Path) -> None:
    missing = warm.run([sys.executable, "-m", "tools." + "nothing_of_the_kind"])
    assert missing.returncode == 1 and "nothing_of_the_kind" in missing.stderr
    done = warm.run(
        [sys.executable, "-m", "tools.ranks", "--ranks-per-node", "1", "raising"], env=environment(tmp_path)
    )
    assert done.returncode == 1 and "No module named raising" in done.stderr


def test_what_is_not_ours_is_started() -> None:
    done = warm.run([sys.executable, "-c", "import sys; print(len(sys.argv)); sys.exit(5)"])
    assert (done.returncode, done.stdout) == (5, "1\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_takes_its_ranks_along(number: int, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "-m", "tools.ranks", "--ranks-per-node", "1", "sleeper", str(tmp_path / "up")]
    started = warm.popen(command, cwd=tmp_path, env=environment(tmp_path), start_new_session=True)
    wait_until((tmp_path / "up").exists)
    assert started.poll() is None and os.getpgid(started.pid) == os.getsid(started.pid) == started.pid
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.killpg(started.pid, signal.SIGKILL) if number == signal.SIGKILL else started.kill()
    assert started.wait(60) == -signal.SIGKILL
    assert len(children) == 1
    wait_until(lambda: not Path(f"/proc/{children[0]}").exists())


def test_a_fork_becomes_another_program(tmp_path: Path) -> None:
    """Read by the program itself, run from a file in a fork of this very process."""
    program = tmp_path / "told.py"
    program.write_text(TOLD)
    read, write = os.pipe()
    kept = os.open(tmp_path, os.O_RDONLY)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        process.become(
            str(program),
            [str(os.getppid()), "b"],
            cwd=str(tmp_path),
            environment={"VARIABLE": "x", "PYTHONPATH": str(tmp_path)},
            streams=(0, write, 2),
            keep=(kept,),
            before=lambda: os.setpgid(0, 0),
        )
    os.close(write)
    signal.signal(signal.SIGUSR1, before)
    signal.signal(signal.SIGUSR2, ignored)
    with open(read) as answer:
        told = answer.read()
    _, status = os.waitpid(pid, 0)
    os.close(kept)
    assert os.waitstatus_to_exitcode(status) == 3
    found = json.loads(told)
    assert found["argv"] == [str(os.getpid()), "b"] and found["cwd"] == str(tmp_path)
    assert found["variable"] == "x" and found["others"] <= 3 and found["group"] and found["parent"]
    assert kept in found["descriptors"] and write not in found["descriptors"]
    assert signal.SIGUSR2 in found["ignored"] and signal.SIGUSR1 not in found["ignored"]


def test_a_warm_verifier_is_what_a_fresh_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdicts, its limit of memory, the arithmetic that it has, and its end."""
    answers = [(Problem("0", "", "0.5"), rf"\boxed{{{text}}}") for text in (r"\frac{2}{4}", "1/3", "x")]
    verdicts, seen = [], []
    for popen in (subprocess.Popen, warm.Popen):
        monkeypatch.setattr(worker_pool, "subprocess", SimpleNamespace(**(vars(subprocess) | {"Popen": popen})))
        with RewardPool(1, deadline_s=60, max_timeout_share=1.0) as pool:
            verdicts.append(pool.score(answers))
            worker = pool._workers[0]._process
            limits = Path(f"/proc/{worker.pid}/limits").read_text()
            mapped = Path(f"/proc/{worker.pid}/maps").read_text()
            seen.append((re.findall(r"Max address space +(\d+)", limits), "gmpy2" in mapped, "libtorch" in mapped))
        assert worker.poll() == -signal.SIGKILL
    assert verdicts[0] == verdicts[1] and verdicts[0][0].value == 1.0
    assert seen[0] == seen[1] == ([str(MAX_WORKER_BYTES)], False, False)


def test_what_the_parent_owns_outlives_a_fork(tmp_path: Path) -> None:
    """Both end by what is registered for the end of a process."""
    program = tmp_path / "own.py"
    program.write_text(
        "import tempfile\nfolder = tempfile.TemporaryDirectory()\nopen('made', 'w').write(folder.name)\n"
    )
    with tempfile.TemporaryDirectory() as mine:
        pid = os.fork()
        if pid == 0:
            sys.stdout = os.fdopen(1, "w")  # owns the descriptor
            process.become(str(program), [], cwd=str(tmp_path), environment={}, streams=(0, 1, 2))
        assert os.waitpid(pid, 0)[1] == 0
        assert Path(mine).is_dir() and not Path((tmp_path / "made").read_text()).exists()


def wait_until(true) -> None:
    deadline = time.monotonic() + 120
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()

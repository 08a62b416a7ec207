"""The GPU runs, rehearsed: every check of every run works on a CPU, and what is broken is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager  # Megatron-Core uses it

from tests import warm
from tests.gpu import operator, training, transformer_engine
from tests.gpu.echo import echo_group

RUNS = {"operator": operator, "training": training, "transformer_engine": transformer_engine}
FAKE = """
import os, sys, time
from tests.gpu import harness
from tests.gpu.harness import Absent, Check, equal, fact, limit, main, target

harness.GRACE_S = 1.0

def good(here): yield limit("error", 0.5, 1.0, "nats"); yield target("speed", 5.0, 1.0, "ms")
def wrong(here): yield limit("error", 2.0, 1.0); yield equal("bits", True, True)
def not_a_number(here): yield limit("error", float("nan"), 1.0)
def raises(here): yield limit("before", 0.0, 1.0); raise RuntimeError("out of memory, say")
def dies(here): yield limit("before", 0.0, 1.0); os._exit(7)
def hangs(here): yield limit("before", 0.0, 1.0); yield fact("pid", os.getpid()); time.sleep(600)
def missing(here): raise Absent("no such tool"); yield

NAMES = ("good", "wrong", "not_a_number", "raises", "dies", "hangs", "missing")
CHECKS = [Check(name, f"fake_run:{name}", seconds=0.3) for name in NAMES]
CHECKS.append(Check("needs the good", "fake_run:good", seconds=1, after=("good", "missing")))
CHECKS.append(Check("needs the wrong", "fake_run:good", seconds=1, after=("good", "wrong")))

if __name__ == "__main__":
    sys.exit(main("fake", CHECKS))
"""
BROKEN = """
import sys
from dataclasses import replace
from tests.gpu import operator, operator_checks
from tests.gpu.harness import main

real = operator_checks.policy_stats

def policy_stats(*arguments, **options):
    found = real(*arguments, **options)
    return replace(found, entropy=found.entropy * 1.001) if found.entropy is not None else found

operator_checks.policy_stats = policy_stats

if __name__ == "__main__":
    sys.exit(main("operator", operator.CHECKS))
"""


def command(module: str, *arguments: str, path: Path | None = None) -> tuple[list[str], dict[str, str]]:
    places = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
    if path:  # a killed run cannot remove its scratch folder
        environment["TMPDIR"] = str(path)
    return [sys.executable, "-m", module, *arguments], environment


def run(module: str, *arguments: str, out: Path, path: Path | None = None) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON file, and what was printed."""
    words, environment = command(module, *arguments, "--out", str(out), path=path)
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, json.loads(out.read_text()), done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_every_check_passes_in_the_rehearsal(name: str, tmp_path: Path) -> None:
    code, found, printed = run(f"tests.gpu.{name}", "--rehearse", out=tmp_path / "out.json")
    log = (tmp_path / "out.log").read_text()
    assert code == 0, printed + log[-3000:]
    assert found["run"] == name and found["rehearsal"] is True and found["passed"] is True
    assert [check["name"] for check in found["checks"]] == [check.name for check in RUNS[name].CHECKS]
    for check in found["checks"]:
        assert check["status"] == ("absent" if check["error"] else "passed"), check
        assert check["lines"] or check["status"] == "absent", check["name"]
        for line in check["lines"]:
            assert line.keys() == {"what", "found", "unit", "expected", "kind", "ok"}
            assert line["ok"] is not False or line["kind"] == "target", line
    judged = [line for check in found["checks"] for line in check["lines"] if line["kind"] in ("limit", "equal")]
    assert len(judged) > 10 and "rehearsal: no claim" in printed
    absent = {check["name"] for check in found["checks"] if check["status"] == "absent"}
    assert absent <= {"kernel cases", "compute-sanitizer"}


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    (tmp_path / "fake_run.py").write_text(FAKE)
    return tmp_path


def test_what_is_broken_is_in_the_file_and_the_run_goes_on(fake: Path) -> None:
    code, found, printed = run("fake_run", "--rehearse", out=fake / "out.json", path=fake)
    checks = {check["name"]: check for check in found["checks"]}
    assert code == 1 and found["passed"] is False
    assert {name: check["status"] for name, check in checks.items()} == {
        "good": "passed",
        "wrong": "failed",
        "not_a_number": "failed",
        "raises": "failed",
        "dies": "failed",
        "hangs": "failed",
        "missing": "absent",
        "needs the good": "passed",
        "needs the wrong": "refused",
    }
    assert checks["not_a_number"]["lines"][0]["found"] == "nan"
    assert "RuntimeError: out of memory, say" in checks["raises"]["error"] and "Traceback" in checks["raises"]["error"]
    assert "code 7" in checks["dies"]["error"] and "killed after 2 s" in checks["hangs"]["error"]
    assert all(checks[name]["lines"][0]["what"] == "before" for name in ("raises", "dies", "hangs"))
    assert "5 failed" in printed and "1 refused (needs the wrong)" in printed


def test_a_kill_loses_nothing_and_leaves_nothing_behind(fake: Path) -> None:
    out = fake / "out.json"
    words, environment = command("fake_run", "--rehearse", "--out", str(out), path=fake)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    checks: dict[str, Any] = {}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(checks.get("hangs", {"lines": ()})["lines"]) < 2:
        time.sleep(0.01)
        checks = {check["name"]: check for check in json.loads(out.read_text())["checks"]} if out.exists() else {}
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = json.loads(out.read_text())
    assert found["passed"] is False
    assert [check["status"] for check in found["checks"]][:6] == ["passed", *["failed"] * 4, "running"]
    assert found["checks"][0]["lines"][0]["found"] == 0.5
    worker = found["checks"][5]["lines"][1]["found"]
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{worker}").exists()


def test_without_time_checks_are_skipped(fake: Path) -> None:
    code, found, printed = run("fake_run", "--rehearse", "--minutes", "0", out=fake / "out.json", path=fake)
    assert code == 1 and "skipped" in printed
    assert {check["status"] for check in found["checks"]} == {"skipped", "refused"}


def test_a_wrong_operator_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "broken_run.py").write_text(BROKEN)
    chosen = ("--only", "speed with the fallback")
    code, found, _ = run("broken_run", "--rehearse", *chosen, out=tmp_path / "out.json", path=tmp_path)
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert code == 1
    assert status["values and gradients"] == "failed" and status["speed with the fallback"] == "refused"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", RUNS)
def test_without_a_gpu_a_run_says_so(name: str, tmp_path: Path) -> None:
    words, environment = command(f"tests.gpu.{name}", "--out", str(tmp_path / "out.json"))
    done = warm.run(words, env=environment)
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr and "--rehearse" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_the_other_ranks_of_an_echo_hold_what_this_one_holds() -> None:
    def others(own: torch.Tensor) -> torch.Tensor:
        return own.repeat(4, 1)

    own = torch.arange(8.0)
    with echo_group(4) as group:
        assert dist.get_world_size() == group.size() == 4 and dist.get_rank() == 0
        total, largest = own.clone(), own.clone()
        dist.all_reduce(total)
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        work.wait()
        assert torch.equal(total, others(own).sum(0)) and torch.equal(largest, own)
        gathered, parts = torch.empty(4, 8), [torch.empty(8) for _ in range(4)]
        dist.all_gather_into_tensor(gathered, own)
        dist.all_gather(parts, own)
        assert torch.equal(gathered, others(own)) and torch.equal(torch.stack(parts), others(own))
        scattered, exchanged = torch.empty(2), torch.empty(8)
        dist.reduce_scatter_tensor(scattered, own)
        dist.all_to_all_single(exchanged, own)
        assert torch.equal(scattered, 4 * own[:2]) and torch.equal(exchanged, own[:2].repeat(4))
        with _coalescing_manager(group, async_ops=True) as manager:
            dist.reduce_scatter_tensor(scattered, own, op=dist.ReduceOp.MAX)
        manager.wait()
        assert torch.equal(scattered, own[:2])
        objects: list[Any] = [None] * 4
        dist.all_gather_object(objects, {"rank": 0})
        dist.barrier()
        assert objects == [{"rank": 0}] * 4
    assert not dist.is_initialized()

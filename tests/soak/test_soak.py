"""A short soak, and that each of its checks finds what it is for."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from tests.soak import compare, strikes, watched_run
from tests.soak.__main__ import RECIPES, Soak
from tests.soak.strikes import KINDS, Strike, Struck
from tests.soak.watched_run import PHASES, SAVING, WatchedRun

RECIPE = replace(RECIPES[0], steps=5)
LAST = "step_000005"
KINDS_BY_NAME = {str(kind): kind for kind in KINDS}
SHORT = (  # a life each, but for the worker's, which the run survives
    Strike(KINDS_BY_NAME["reward worker SIGKILL"], "step", 0.05, rank=1, steps=0),
    Strike(KINDS_BY_NAME["a rank SIGKILL"], "save: shards", 0.0, rank=1, steps=1),
    Strike(KINDS_BY_NAME["launcher SIGTERM"], "step", 0.5, rank=0, steps=0),
)


@pytest.mark.timeout(1800)  # four starts of real runs, on a machine that may be busy
def test_a_struck_run_ends_like_one_that_nobody_struck(tmp_path: Path) -> None:
    soak = Soak(tmp_path, print)
    soak.run(RECIPE, iter(SHORT))
    assert soak.exit_codes == {0: 1, 75: 1, 137: 1}, soak.exit_codes
    assert soak.strikes.total() == len(SHORT)
    phases = {phase for _, phase in soak.strikes}
    assert phases <= set(PHASES)
    assert phases - {"starting", "ending", "after a save", *(f"save: {part}" for part in SAVING)}, "no stack was read"


def test_every_kind_and_every_aim_comes_before_any_comes_again() -> None:
    source = strikes.drawn(3, world=2)
    first = [next(source) for _ in range(len(KINDS) * len(strikes.AIMS))]
    assert {strike.kind for strike in first[: len(KINDS)]} == set(KINDS)
    assert {strike.aim for strike in first[: len(strikes.AIMS)]} == set(strikes.AIMS)
    assert {strike.rank for strike in first} == {0, 1}
    again = strikes.drawn(3, world=2)
    assert [next(again) for _ in first] == first


@pytest.fixture
def run(tmp_path: Path) -> WatchedRun:
    """A run that never started."""
    run = WatchedRun(tmp_path / "run", RECIPE, tmp_path)
    run.path.mkdir()
    return run


def test_what_is_left_is_found(run: WatchedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_run, "GONE_S", 0.1)
    (run.path / ".lock").touch()
    assert run.leftovers() == []
    process = subprocess.Popen(["sleep", "60"], cwd=run.folder)
    with (run.path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = run.leftovers()
    process.kill()
    process.wait()
    assert found == [f"process {process.pid} is left: sleep 60 ", "the run's folder is still locked"]
    (run.folder / "tmp" / "anything").touch()
    (run.path / "config.tmp").touch()
    (run.checkpoints / "step_000002.tmp-x").mkdir(parents=True)
    names = {".lock", "config.tmp", "step_000002.tmp-x", "anything"}
    assert {path.name for path in run.temporary_files()} == names


def test_how_far_a_save_is(run: WatchedRun) -> None:
    def state(*names: str, latest: str = "step_000001") -> str | None:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        for name in names:
            (run.checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
            (run.checkpoints / name).touch()
        (run.checkpoints / "latest").write_text(latest + "\n")
        return run.saving()

    assert state("step_000001/x") is None
    assert state("step_000001/x", "step_000002.tmp-y/x") == "shards"
    assert state("step_000001/x", "step_000002.tmp-y/MANIFEST.json") == "manifest"
    assert state("step_000001/x", "step_000002/x") == "rename"
    assert state("step_000001/x", "step_000002/x", "latest.tmp-y") == "latest"
    assert state("step_000001.tmp-z/x", "step_000002/x", latest="step_000002") == "removal"


STOPPED = "SIGTERM: the ranks save after this step and end\n"
NAMED = "ranks: rank 1 was killed by SIGKILL; the others are ended\n"


@pytest.mark.parametrize(
    ("kind", "code", "output", "faults"),
    [
        ("a rank SIGKILL", 137, NAMED, []),
        ("a rank SIGKILL", 137, NAMED.replace("1", "0"), ["struck: rank 1; named: 0"]),
        ("a rank SIGKILL", 1, NAMED, ["exit code 1, expected 137"]),
        ("all ranks SIGKILL", 137, "", ["no rank was named"]),
        ("a rank SIGSTOP", 77, "ranks: rank 1 (process 9) in reward of step 2 has been stopped", []),
        ("a rank SIGSTOP", 77, "", ["struck: rank 1; named: none"]),
        ("launcher SIGTERM", 75, STOPPED, []),
        ("launcher SIGTERM", 75, "", ["SIGTERM was not answered"]),
        ("launcher SIGTERM", 0, STOPPED + "Traceback (most", ["a traceback, though it was only asked to stop"]),
        ("launcher SIGTERM", 1, STOPPED, ["exit code 1, expected 75"]),
        ("launcher SIGKILL", -9, "", []),
        ("launcher SIGKILL", 137, "", ["exit code 137, expected -9"]),
    ],
)
def test_a_wrong_end_is_found(kind: str, code: int, output: str, faults: list[str], run: WatchedRun) -> None:
    run.log.write_text(output)
    strike = Strike(KINDS_BY_NAME[kind], "step", 0.5, rank=1, steps=0)
    assert Struck(strike, "rollout", heard=True).faults(run, code) == faults


def test_a_signal_before_there_is_a_handler_may_end_the_launcher(run: WatchedRun) -> None:
    run.log.write_text("")
    strike = Strike(KINDS_BY_NAME["launcher SIGHUP"], "start", 0.0, rank=1, steps=0)
    assert Struck(strike, "starting", heard=False).faults(run, -signal.SIGHUP) == []
    assert Struck(strike, "starting", heard=True).faults(run, -signal.SIGHUP) == ["exit code -1, expected 75"]


def written(folder: Path) -> WatchedRun:
    """What a finished run leaves, but small: two tensors in a checkpoint that torch itself wrote."""
    run = WatchedRun(folder, RECIPE, folder)
    checkpoint = run.checkpoints / LAST
    tensors = {"weight": torch.arange(6.0).view(2, 3), "optimizer.state.exp_avg.weight": torch.ones(2, 3)}
    save(tensors, storage_writer=FileSystemWriter(checkpoint), no_dist=True)
    state = {"state": {"method": {"integral": 2.0}, "order": torch.arange(7)}}
    torch.save(state, checkpoint / "state.pt")
    (run.checkpoints / "latest").write_text(LAST + "\n")
    (run.path / "config.json").write_text("{}")
    for step in range(1, RECIPE.steps + 1):
        for name in ("metrics.jsonl", "samples.jsonl"):
            with (run.path / name).open("a") as file:
                print(json.dumps({"step": step, "loss/total": step / 3, "time/step_s": time.monotonic()}), file=file)
    seal(run.path)
    return run


def other_metric(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    *lines, last = file.read_text().splitlines()
    record = json.loads(last)
    record["loss/total"] = math.nextafter(record["loss/total"], 9)
    file.write_text("\n".join([*lines, json.dumps(record)]) + "\n")


def fewer_samples(folder: Path) -> None:
    file = folder / "samples.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def damaged_tensor(folder: Path) -> None:
    shard = next((folder / "checkpoints" / LAST).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes().replace(b"\x00\x00\xa0\x40", b"\x00\x00\xa1\x40"))  # 5.0: weight's last


def other_tensor(folder: Path) -> None:
    """With a manifest that agrees: only the uninterrupted run's checkpoint tells."""
    damaged_tensor(folder)
    seal(folder)


def unreadable_tensor(folder: Path) -> None:
    shard = next((folder / "checkpoints" / LAST).glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    seal(folder)


def other_state(folder: Path) -> None:
    file = folder / "checkpoints" / LAST / "state.pt"
    content = torch.load(file, weights_only=True)
    content["state"]["method"]["integral"] += 1e-9
    torch.save(content, file)
    seal(folder)


def older_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "latest").write_text(f"step_{RECIPE.steps - 1:06d}\n")


def seal(folder: Path) -> None:
    """Write the checkpoint's manifest anew."""
    checkpoint = folder / "checkpoints" / LAST
    (checkpoint / "MANIFEST.json").unlink(missing_ok=True)
    contents = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: None, []),
        (other_metric, ["metrics.jsonl: .* step 5: loss/total is", "tools.compare_runs --bitwise: not equal: step 5"]),
        (fewer_samples, ["samples.jsonl: 4 lines, expected 5"]),
        (damaged_tensor, [f"{LAST}/__0_0.distcp is not what the manifest says"]),
        (other_tensor, [f"{LAST}/__0_0.distcp differs", f"{LAST}: 1 of 2 tensors differ, the first weight"]),
        (unreadable_tensor, [f"{LAST}/__0_0.distcp differs", f"{LAST}: torch cannot read it"]),
        (other_state, [f"{LAST}/state.pt differs", f"{LAST}/state.pt: state.method.integral differs"]),
        (older_checkpoint, ["the last checkpoint is of step 4, expected 5"]),
    ],
)
def test_a_difference_is_found(change: Callable[[Path], object], found: list[str], tmp_path: Path) -> None:
    reference, run = written(tmp_path / "reference"), written(tmp_path / "run")
    change(run.path)
    differences = compare.differences(run, reference)
    assert len(differences) == len(found), differences
    for each, pattern in zip(differences, found, strict=True):
        assert re.match(pattern, each), each


def test_a_difference_is_found_before_the_run_is_done(tmp_path: Path) -> None:
    reference, run = written(tmp_path / "reference"), written(tmp_path / "run")
    assert compare.faults_so_far(run, reference) == []
    fewer_samples(run.path)  # killed while it wrote
    metrics = run.path / "metrics.jsonl"
    three = "".join(metrics.read_text().splitlines(keepends=True)[:3])
    metrics.write_text(three + '{"step": 4, "lo')
    assert compare.faults_so_far(run, reference) == []
    metrics.write_text(three)
    other_metric(run.path)
    damaged_tensor(run.path)
    found = compare.faults_so_far(run, reference)
    assert found[0].startswith("step 3: loss/total is") and found[1].startswith(f"{LAST}/__0_0.distcp is not what")
    shutil.rmtree(run.checkpoints / LAST)
    assert "which latest names, is damaged" in compare.faults_so_far(run, reference)[1]

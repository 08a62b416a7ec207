"""A checkpoint is written while training goes on: it holds what was true at its save, and is committed when whole."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint import checkpoint, manifest
from megatron_ext.checkpoint.manifest import CheckpointError
from megatron_ext.train import loop
from tests import gloo
from tests.train import whole_run
from tests.train.tiny_run import STATE, Trainer, equal

RECIPE = "siren/siren-tiny-cpu.toml"
OPTIONS = ("train.steps=3", "method.coef=1.0", "parallel.tensor=2")


def held_back(gate: threading.Event, until: str) -> None:
    """Writing of the checkpoint named ``until`` stops after half a file, until the gate opens."""
    module: Any = checkpoint
    real = module.write_chunks

    def write_chunks(path: Path, chunks: Any) -> Any:
        if path.parent.name.startswith(until):
            path.write_bytes(b"half")
            assert gate.wait(60)
            path.unlink()
        return real(path, chunks)

    module.write_chunks = write_chunks


def overlapped(rank: int, world: int, root: Path) -> tuple[dict, dict]:
    run, gate = Trainer(world).fill(1), threading.Event()
    torch.manual_seed(0)
    if rank == 1:
        held_back(gate, "step_000001")
    at_first = run.train(1).whole()
    checkpoints = run.checkpoints(root)
    checkpoints.save(1, STATE)
    assert checkpoints.publish(wait=False) is None and manifest.newest_valid(root) is None, "one rank still writes"
    at_second = run.train(1).whole()
    assert checkpoints.publish(wait=False) is None
    gate.set()
    checkpoints.save(2, STATE)
    assert (root / "latest").read_text() == "step_000001\n", "the second save waits for the first"
    published = checkpoints.publish(wait=True)
    assert published is not None and published.path.name == "step_000002" and published.seconds > 0
    assert checkpoints.publish(wait=True) is None
    return at_first, at_second


def resumed(rank: int, world: int, root: Path) -> dict:
    run = Trainer(world).fill(2)
    run.load(root)
    return run.whole()


def test_a_checkpoint_holds_what_was_true_at_its_save(tmp_path: Path) -> None:
    at_first, at_second = gloo.run(overlapped, 2, tmp_path)[0]
    assert not equal(at_first, at_second)
    assert equal(gloo.run(resumed, 2, tmp_path)[0], at_second)
    shutil.rmtree(tmp_path / "step_000002")
    (tmp_path / "latest").write_text("step_000001\n")
    assert equal(gloo.run(resumed, 2, tmp_path)[0], at_first)


def killed_while_writing(rank: int, world: int, folder: Path) -> None:
    """Rank 1 gets SIGKILL in its third step, while its thread still writes the checkpoint of the second."""
    gate = threading.Event()
    module: Any = loop
    held_back(gate, "step_000002")
    real = loop.train_step

    def train_step(trainer: loop.Trainer, watch: Any) -> Any:
        if trainer.step == 2 and rank == 1:
            [partial] = (folder / "run" / "checkpoints").glob("step_000002.tmp-*")
            assert (partial / "__1_0.distcp").read_bytes() == b"half"
            os.kill(os.getpid(), signal.SIGKILL)
        return real(trainer, watch)

    module.train_step = train_step
    whole_run._rank(rank, world, folder, RECIPE, OPTIONS, None)


def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert whole_run.train(tmp_path / "whole", RECIPE, *OPTIONS, world=2) == 0
    with pytest.raises(AssertionError, match="died without a report|Connection"):
        gloo.run(killed_while_writing, 2, tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "run" / "checkpoints"
    names = sorted(path.name.split("-")[0] for path in checkpoints.iterdir())
    assert names == ["latest", "step_000001", "step_000002.tmp"]
    found = manifest.newest_valid(checkpoints)
    assert found and found.manifest.step == 1
    assert whole_run.train(tmp_path / "killed", RECIPE, *OPTIONS, world=2) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000002", "step_000003"]
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    for step in (2, 3):
        assert whole_run.contents(tmp_path / "killed", step) == whole_run.contents(tmp_path / "whole", step)


def removal_held_back(rank: int, world: int, root: Path) -> list[str]:
    """What is on the disk while the thread removes the first checkpoint, and once the third is about to be written."""
    run, gate = Trainer(world).fill(1), threading.Event()
    checkpoints = run.checkpoints(root, keep=1)
    checkpoints.save(1, STATE)
    checkpoints.publish(wait=True)
    module: Any = manifest
    real, removed = module.remove, list[str]()

    def remove(path: Path) -> None:
        assert gate.wait(60)
        real(path)
        removed.append(path.name.split("-")[0])

    module.remove = remove
    checkpoints.save(2, STATE)
    while checkpoints.publish(wait=False) is None:
        pass
    if rank == 0:
        names = sorted(path.name.split("-")[0] for path in root.iterdir())
        assert names == ["latest", "step_000001.tmp", "step_000002"] and not removed
        found = manifest.newest_valid(root)
        assert found and found.manifest.step == 2
    dist.barrier()
    threading.Timer(0.5, gate.set).start()
    checkpoints.save(3, STATE)
    seen = list(removed)  # else the save would have found it left behind, and removed it beside the thread
    checkpoints.publish(wait=True)
    return seen


def test_an_old_checkpoint_is_removed_beside_training_and_before_the_next_save(tmp_path: Path) -> None:
    assert gloo.run(removal_held_back, 2, tmp_path) == [["step_000001.tmp"], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000003"]


def slow_removal(rank: int, world: int, folder: Path, options: tuple[str, ...]) -> list[str]:
    """What is on the disk when a run ends whose old checkpoints take their time to go."""
    module: Any = manifest
    real = module.remove

    def remove(path: Path) -> None:
        time.sleep(0.5)
        real(path)

    module.remove = remove
    whole_run._rank(rank, world, folder, RECIPE, options, None)
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_ends_when_its_old_checkpoints_are_gone(asynchronous: str, tmp_path: Path) -> None:
    options = (*OPTIONS, "checkpoint.keep=1", "checkpoint.every=1", f"checkpoint.asynchronous={asynchronous}")
    assert gloo.run(slow_removal, 2, tmp_path, options)[0] == ["latest", "step_000003"]


def writer_dies(rank: int, world: int, root: Path) -> str:
    """The last checkpoint that may be kept is written; of the next one, rank 1's thread dies half-way."""
    run = Trainer(world).fill(1)
    torch.manual_seed(0)
    checkpoints = run.train(1).checkpoints(root, keep=1)
    checkpoints.save(1, STATE)
    checkpoints.publish(wait=True)
    module: Any = checkpoint
    real = module.write_chunks

    def dies(path: Path, chunks: Any) -> Any:
        path.write_bytes(b"half")
        raise MemoryError("no room for a copy")

    module.write_chunks = dies if rank == 1 else real
    run.train(1)
    checkpoints.save(2, STATE)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.publish(wait=True)
    dist.barrier()  # rank 0 removes what was written
    assert not checkpoints.is_writing and (root / "latest").read_text() == "step_000001\n"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000001"]
    assert run.load(root).step == 1
    module.write_chunks = real
    checkpoints.save(2, STATE)
    assert checkpoints.publish(wait=True) is not None
    return str(caught.value)


def test_a_writer_that_dies_on_one_rank_is_told_on_all_and_costs_no_checkpoint(tmp_path: Path) -> None:
    said = gloo.run(writer_dies, 2, tmp_path)
    assert said[0] == said[1] == "writing the shards: rank 1: MemoryError: no room for a copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]


def test_waiting_for_the_disk_or_not_makes_no_difference(tmp_path: Path) -> None:
    """Nor does where the time went: both say what the run waited, and what was spent beside it."""
    for name in ("true", "false"):
        options = (*OPTIONS, f"checkpoint.asynchronous={name}")
        assert whole_run.train(tmp_path / name, RECIPE, *options, world=2) == 0
        times = [set(step) for step in whole_run.steps(tmp_path / name)]
        assert all("time/save_s" in step for step in times) and "time/save_background_s" in times[-1], times
    assert whole_run.metrics(tmp_path / "true") == whole_run.metrics(tmp_path / "false")
    assert whole_run.contents(tmp_path / "true", 3) == whole_run.contents(tmp_path / "false", 3)

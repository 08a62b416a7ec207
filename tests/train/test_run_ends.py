"""How a run ends before its last step, and what it goes on with: signals in every phase, losses that are no numbers."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import checkpoint
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.train import loop
from megatron_ext.train.signals import REQUEUE
from megatron_ext.train.step import Learner
from tests import gloo
from tests.train import whole_run

RECIPE = "siren/siren-tiny-cpu.toml"
ONE_UPDATE = ("train.mini_batch_prompts=4", "checkpoint.keep=9")
PHASES: dict[str, tuple[Any, str]] = {
    "rollout": (HFEngine, "generate"),
    "reward": (whole_run.ExactRewards, "score"),
    "update": (Learner, "update"),
    "save": (checkpoint.Checkpoints, "save"),
    "write": (checkpoint, "write_chunks"),
}


def signalled(rank: int, world: int, folder: Path, phase: str, *overrides: str) -> int:
    """A run whose last rank gets SIGTERM in ``phase`` of its second step, SIGUSR1 in the midst of what follows."""
    owner, name = PHASES[phase]
    real, train_step = getattr(owner, name), loop.train_step
    module: Any = loop
    begun = []

    def step(trainer: loop.Trainer, watch: Any) -> Any:
        begun.append(trainer.step)
        return train_step(trainer, watch)

    def interrupted(*args: Any, **named: Any) -> Any:
        if len(begun) == 2 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            result = real(*args, **named)
            os.kill(os.getpid(), signal.SIGUSR1)
            return result
        return real(*args, **named)

    module.train_step = step
    setattr(owner, name, interrupted)
    return whole_run._rank(rank, world, folder, RECIPE, overrides, None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert whole_run.train(folder, RECIPE, "train.steps=4", "checkpoint.every=0", world=2) == 0
    return folder


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_once_and_the_run_goes_on(phase: str, uninterrupted: Path, tmp_path: Path) -> None:
    """No checkpoint is due: the one that is found is the signal's; in ``save`` and ``write`` it meets one that is."""
    every = 2 if phase in ("save", "write") else 0
    options = ("train.steps=4", f"checkpoint.every={every}")
    assert gloo.run(signalled, 2, tmp_path, phase, *options) == [REQUEUE] * 2
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["latest", "step_000002"]
    assert whole_run.metrics(tmp_path) == whole_run.metrics(uninterrupted)[:2]
    assert whole_run.train(tmp_path, RECIPE, *options, world=2) == 0
    assert whole_run.metrics(tmp_path) == whole_run.metrics(uninterrupted)
    assert whole_run.contents(tmp_path, 4) == whole_run.contents(uninterrupted, 4)


def with_bad_losses(
    rank: int, world: int, folder: Path, bad: Callable[[int], bool], die_after: int | None, *overrides: str
) -> int:
    """A run in which the last rank's loss is NaN in the steps (from 0) that ``bad`` names."""
    module: Any = loop
    train_step = loop.train_step

    def step(trainer: loop.Trainer, watch: Any) -> Any:
        method: Any = trainer.learner.method
        loss = type(method).loss
        factor = math.nan if bad(trainer.step) and rank == world - 1 else 1.0
        method.loss = lambda *args: factor * loss(method, *args)
        return train_step(trainer, watch)

    module.train_step = step
    return whole_run._rank(rank, world, folder, RECIPE, (*ONE_UPDATE, *overrides), die_after)


def test_a_loss_of_one_rank_that_is_no_number_costs_all_ranks_that_update_and_no_other(tmp_path: Path) -> None:
    assert gloo.run(with_bad_losses, 2, tmp_path, lambda step: step == 1, None, "train.steps=3") == [0, 0]
    steps = whole_run.steps(tmp_path)
    assert [step["grad/skipped"] for step in steps] == [0, 1, 0]
    assert [step["alarm/not_finite"] for step in steps] == [0, 1, 0]
    first, second, third = (whole_run.contents(tmp_path, step) for step in (1, 2, 3))
    for rank in (0, 1):  # weights, optimizer
        assert first[f"__{rank}_0.distcp"] == second[f"__{rank}_0.distcp"] != third[f"__{rank}_0.distcp"]


def test_bad_updates_in_a_row_end_the_run_also_when_it_was_killed_between_them(tmp_path: Path) -> None:
    def bad(step: int) -> bool:
        return step >= 1

    with pytest.raises(AssertionError, match=r"TrainingError: the gradient was not finite in 3 updates in a row"):
        gloo.run(with_bad_losses, 2, tmp_path / "whole", bad, None, "train.steps=9")
    assert len(whole_run.steps(tmp_path / "whole")) == 3
    with pytest.raises(AssertionError, match="died without a report"):
        gloo.run(with_bad_losses, 2, tmp_path / "killed", bad, 2, "train.steps=9")
    with pytest.raises(AssertionError, match=r"TrainingError: the gradient was not finite in 3 updates in a row"):
        gloo.run(with_bad_losses, 2, tmp_path / "killed", bad, None, "train.steps=9")
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")


LEFT = """
import atexit, sys, threading, time
from megatron_ext.train.signals import STEP_THREAD, leave
over = threading.Event()
threading.Thread(target=over.wait, name=STEP_THREAD + "rollout", daemon=True).start()
threading.Thread(target=over.wait).start()  # such as a pool's, which that one would end
atexit.register(print, "and temporary files are gone")
print("said", end=" ")
leave(3)
"""


def test_a_rank_ends_with_its_code_whatever_threads_a_failed_step_has_left() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said and temporary files are gone\n", "")

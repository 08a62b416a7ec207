"""What the training command does around training: a rank's allocator, what a fault ends in, and the report."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.manifest import CheckpointError
from megatron_ext.config.errors import ConfigError
from megatron_ext.metrics.alarms import AlarmError
from megatron_ext.model.trainable import TrainingError
from megatron_ext.rollout.base import RolloutError
from megatron_ext.rollout.rewards.reward_pool import VerifierError
from megatron_ext.train.mismatch import MismatchError
from tools import train

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/siren/siren-tiny-cpu.toml"
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SEEN = """
import os, sys
class Torch:  # the first import of torch sees what its allocator will read
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("at import:", os.environ.get("PYTORCH_ALLOC_CONF"))
            os._exit(0)
sys.meta_path.insert(0, Torch())
from tools import train
train.main(sys.argv[1:])
"""


def test_a_key_given_as_an_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train.main([RECIPE, "--steps", "5"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--steps 5; keys of the recipe are set as section.key=value, such as train.steps=5" in said


def test_several_nodes_are_told_the_command_that_submits_them(capfd: pytest.CaptureFixture[str]) -> None:
    """With the same overrides; the command is run as it is told, by a shell."""
    assert train.main([RECIPE, "parallel.nodes=2", 'name="two words"']) == 2
    said = capfd.readouterr().err
    told = said[said.index("RECIPE=") : said.index(", or megatron-entropy launch")]
    done = subprocess.run(f"DRY_RUN=1 {told}", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    submitted = next(line for line in done.stdout.splitlines() if " sbatch " in line)
    assert shlex.split(submitted)[-2:] == ["parallel.nodes=2", 'name="two words"'] and RECIPE in submitted


@pytest.mark.parametrize(
    ("engine", "given", "expected"),
    [
        ("hf", {}, "expandable_segments:True"),
        ("vllm_server", {}, "expandable_segments:True"),
        ("vllm", {}, "None"),
        ("hf", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("hf", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_a_ranks_segments_grow_unless_vllm_shares_its_process(engine: str, given: dict, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), **given}
    command = [sys.executable, "-c", SEEN, RECIPE, f"rollout.engine={engine}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"at import: {expected}"], done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("this"), 2),
        (VerifierError("this"), 3),
        (AlarmError("this"), 3),
        (MismatchError("this"), 3),
        (RolloutError("this"), 3),
        (TrainingError("this"), 3),
        (CheckpointError("this"), 4),
    ],
)
def test_a_fault_with_a_meaning_is_a_message_and_an_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "load_config", fail)
    assert train.main([RECIPE]) == code
    said = capsys.readouterr().err
    assert said.endswith("\nthis\n") and "Traceback" not in said


def test_a_full_gpu_is_told_with_what_helps_and_where_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train, "load_config", fail)
    assert train.main([RECIPE]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.index("Tried to allocate 2 GiB") < said.index("Lower train.micro_batch_tokens")


@pytest.mark.parametrize(("found", "rank", "faulty"), [(0, 3, False), (4, 3, False), (3, 3, True)])
def test_a_rank_without_a_gpu_of_its_own_is_told(
    found: int, rank: int, faulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(ConfigError, match="found 3 visible ones; set it to 3") if faulty else nullcontext():
        train._check_gpu()


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    for command in ("methods", "recipes"):
        read, write = os.pipe()
        os.close(read)
        line = [sys.executable, "-m", "tools.cli", command]
        done = subprocess.run(line, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, "")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(train, "load_config", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train.main([RECIPE])


FINISHED = """
import os, signal, sys
from megatron_ext.train.signals import StopSignals, heed_interrupts
from tools import ranks, train
from tools.report import page
def write_report(folder):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return "written"
ranks.run_ranks, page.write_report = lambda *_: 0, write_report
heed_interrupts()
StopSignals()
sys.exit(train.main(sys.argv[1:]))
"""


def test_signals_do_not_end_a_finished_run_that_writes_its_report() -> None:
    """It would be run again, or take its end for an interrupted one."""
    command = [sys.executable, "-c", FINISHED, RECIPE]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["report: written"]), done.stderr

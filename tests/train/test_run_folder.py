"""One run owns a folder: the lock between real processes, and the count of stops without progress."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.train.run_folder import RunFolder

HOLD = """
import sys
from pathlib import Path
from megatron_ext.train.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_with_the_firsts_process_and_host(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"another run is at work.*process {first.pid} on {socket.gethostname()}"):
        RunFolder(tmp_path / "run").__enter__()
    with RunFolder(tmp_path / "other"):
        pass
    first.communicate()
    with RunFolder(tmp_path / "run"):
        pass


def test_a_killed_holder_leaves_nothing_to_remove(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.kill()
    first.wait()
    assert (tmp_path / ".lock").read_text().startswith(f"process {first.pid} ")
    with RunFolder(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    first = holder(tmp_path)
    ending = threading.Timer(0.5, first.kill)
    ending.start()
    with RunFolder(tmp_path):
        assert first.wait() == -signal.SIGKILL
    ending.join()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "empty"):
        pass
    with RunFolder(tmp_path / "begun"):
        (tmp_path / "begun" / "config.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]
    assert [path.name for path in (tmp_path / "begun").iterdir()] == ["config.json"]


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_the_folders(tmp_path: Path, monkeypatch) -> None:
    """The holder ends between another's opening the file and its locking it, and a third comes in between."""
    module, third = sys.modules[RunFolder.__module__], RunFolder(tmp_path)
    lock = module.fcntl.flock

    def late(*arguments: int) -> None:
        monkeypatch.setattr(module.fcntl, "flock", lock)
        (tmp_path / ".lock").unlink()
        third.__enter__()
        lock(*arguments)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="another run is at work"):
        RunFolder(tmp_path).__enter__()
    third.__exit__()


def test_a_log_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / "a\0b", Path("/proc/run")):
        with pytest.raises(ConfigError, match="log.dir: the run's folder .* cannot be written"):
            RunFolder(path).__enter__()


def stop(folder: Path, code: int = 75, checkpoint: str = "") -> int:
    with RunFolder(folder) as run:
        (folder / "checkpoints").mkdir(exist_ok=True)
        if checkpoint:
            (folder / "checkpoints" / "latest").write_text(checkpoint)
        return run.exit_code(code)


def test_stops_without_a_new_checkpoint_are_counted_and_the_third_is_not_queued_again(tmp_path: Path, capsys) -> None:
    assert [stop(tmp_path) for _ in range(2)] == [75, 75]
    assert stop(tmp_path, checkpoint="step_000002") == 75
    assert [stop(tmp_path, checkpoint="step_000002") for _ in range(4)] == [75, 75, 76, 76]
    assert "stopped 4 times in a row before anything new was saved" in capsys.readouterr().err
    assert stop(tmp_path, code=2) == 2
    assert stop(tmp_path) == 75
    assert stop(tmp_path, code=0) == 0
    assert not (tmp_path / "stops.json").exists()


def test_what_a_killed_run_saved_counts_as_something_new(tmp_path: Path) -> None:
    """A kill leaves no time to forget the stops before it."""
    assert [stop(tmp_path) for _ in range(2)] == [75, 75]
    (tmp_path / "checkpoints" / "latest").write_text("step_000002")
    assert [stop(tmp_path) for _ in range(3)] == [75, 75, 76]

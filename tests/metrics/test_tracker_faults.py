"""No tracker can stop, slow or keep a run, whatever happens to it; what it missed it is given later."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import psutil
import pytest
from swanlab.converter.wb.wbdatastore import WBDataStoreReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from megatron_ext.metrics import trackers
from megatron_ext.metrics import writer as metrics
from megatron_ext.metrics.writer import METRICS, MetricsWriter, read_steps, write_config
from tools import train

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "recipes" / "tiny" / "tiny-cpu.toml")
PATIENCE_S = 300.0  # of the tests, on a busy machine


def write(writer: MetricsWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        writer.write(step, {"reward/mean": step / 7})


def processes(run_dir: Path) -> list[psutil.Process]:
    """Those of the run's trackers, and what they started."""
    trackers = [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in (p.info["cmdline"] or ())]
    return trackers + [child for each in trackers for child in each.children(recursive=True)]


def wait_until(what: str, condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def scalars(run_dir: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("reward/mean")]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(metrics, "FINISH_S", PATIENCE_S)
    for key in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(key)
    folder = tmp_path / "run"
    write_config(folder, {"name": "run", "train": {"steps": 9}})
    return folder


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """MLflow's server, for this test: it takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_killed_tracker_is_named_once_and_given_later_what_it_missed(run_dir: Path) -> None:
    with MetricsWriter(run_dir, trackers=["tensorboard"], total_steps=9) as writer:
        write(writer, 1, 2)
        wait_until("two steps are logged", lambda: '"step": 2' in state(run_dir, "tensorboard"))
        (process,) = processes(run_dir)
        process.kill()
        said: list[str] = []
        wait_until("it is named", lambda: said.extend(writer.lines()) or said)
        write(writer, 3, 5)
        assert writer.lines() == [] and len(said) == 1
        assert said[0].startswith("tracker tensorboard is off: ") and said[0].endswith("training goes on")
    assert [record["step"] for record in read_steps(run_dir / METRICS)] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars(run_dir)] == [1, 2]
    with MetricsWriter(run_dir, trackers=["tensorboard"], total_steps=9, resume_step=4) as writer:
        write(writer, 5, 6)
    assert writer.lines() == []
    assert scalars(run_dir) == [(step, pytest.approx(step / 7)) for step in range(1, 7)]


def test_a_run_that_begins_anew_is_a_new_one_in_its_trackers(run_dir: Path) -> None:
    for last in (4, 2):
        with MetricsWriter(run_dir, trackers=["tensorboard"], total_steps=9) as writer:
            write(writer, 1, last)
    assert [step for step, _ in scalars(run_dir)] == [1, 2]


def test_what_was_validated_before_training_is_step_0(run_dir: Path) -> None:
    with MetricsWriter(run_dir, trackers=["tensorboard"], total_steps=9) as writer:
        write(writer, 0, 2)
    with MetricsWriter(run_dir, trackers=["tensorboard"], total_steps=9, resume_step=2) as writer:
        write(writer, 3, 3)
    assert [record["step"] for record in read_steps(run_dir / METRICS)] == [0, 1, 2, 3]
    assert [step for step, _ in scalars(run_dir)] == [0, 1, 2, 3]


def test_a_secret_that_a_model_repeats_does_not_reach_a_tracker(run_dir: Path) -> None:
    secret = "hunter2hunter2hunter2"
    sample = {"prompt": f"say hf_{secret}", "tokens": ["it is hf", "_", secret, ", I", " think"]}
    with MetricsWriter(run_dir, trackers=["tensorboard"], total_steps=9) as writer:
        writer.write(1, {"reward/mean": 1.0}, [sample])
    (event,) = EventAccumulator(str(run_dir / "tensorboard")).Reload().Tensors("samples")
    (text,) = event.tensor_proto.string_val
    assert b"it is ***, I think" in text and b"say ***" in text and secret.encode() not in text


def test_a_server_that_never_answers_holds_up_neither_steps_nor_the_end(
    run_dir: Path, silent_server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FINISH_S", 0.5)
    with MetricsWriter(run_dir, trackers=["mlflow"], total_steps=9) as writer:
        silent_server.accept()  # from now on it waits for an answer
        write(writer, 1, 9)
        assert writer.lines() == []
    (line,) = writer.lines()
    assert line.startswith("tracker mlflow did not finish within 0 s; the same command again gives it the rest")
    assert processes(run_dir) == []


def test_a_tracker_that_hangs_dies_with_a_killed_run(run_dir: Path, silent_server: socket.socket) -> None:
    code = (
        "import sys, time; from megatron_ext.metrics.writer import MetricsWriter\n"
        "with MetricsWriter(sys.stdin.readline(), trackers=['mlflow'], total_steps=9): time.sleep(1000)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment, text=True)
    assert run.stdin is not None
    run.stdin.write(str(run_dir))
    run.stdin.close()
    silent_server.accept()
    assert len(processes(run_dir)) == 1
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until("the tracker is gone", lambda: not processes(run_dir))


def test_an_interrupted_run_waits_for_no_tracker(run_dir: Path, silent_server: socket.socket) -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), MetricsWriter(run_dir, trackers=["mlflow"], total_steps=9):
        raise KeyboardInterrupt
    assert time.monotonic() - start < PATIENCE_S / 2 and processes(run_dir) == []


def test_a_key_without_a_network_writes_offline_and_a_failed_run_is_marked_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    with (
        pytest.raises(RuntimeError, match="a fault"),
        MetricsWriter(run_dir, trackers=["wandb"], total_steps=9) as writer,
    ):
        write(writer, 1, 2)
        raise RuntimeError("a fault")
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    codes = []
    with WBDataStoreReader() as reader:
        reader.open(file)
        while (data := reader.scan()) is not None:
            record = Record.FromString(data)
            codes += [record.exit.exit_code] if record.HasField("exit") else []
    assert codes == [1]


def test_a_disk_that_cannot_be_written_costs_the_tracker_only(run_dir: Path) -> None:
    (run_dir / "tensorboard").write_text("in the way")
    (run_dir / "trackers").mkdir()
    (run_dir / "trackers" / "swanlab.log").mkdir()
    with MetricsWriter(run_dir, trackers=["tensorboard", "swanlab"], total_steps=9) as writer:
        said = writer.lines()
        wait_until("both are named", lambda: said.extend(writer.lines()) or len(said) == 2)
        write(writer, 1, 3)
    assert said[0].startswith("tracker swanlab is off, it could not be started: ")
    assert said[1].startswith("tracker tensorboard is off: ") and "tensorboard.log" in said[1]
    assert len(list(read_steps(run_dir / METRICS))) == 3


def test_a_package_that_is_not_installed_is_a_configuration_error_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_alembic(name: str) -> Distribution:
        if name == "alembic":
            raise PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(trackers, "distribution", without_alembic)
    override = 'log.trackers=["tensorboard", "mlflow"]'
    assert train.main([TINY, f"log.dir={tmp_path}", override, "--print-config"]) == 0
    assert train.main([TINY, f"log.dir={tmp_path}", override]) == 2
    said = capsys.readouterr().err
    assert "log.trackers: alembic not installed" in said and "-m pip install alembic" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "log.tensorboard=false",
            'log.tensorboard: unknown key; here it is log.trackers (a list: ["tensorboard"], or [] for none)',
        ),
        ('log.trackers=["weights"]', "Input should be 'tensorboard', 'wandb', 'mlflow', 'swanlab' or 'trackio'"),
        ('log.trackers=["wandb", "wandb"]', "log.trackers"),
    ],
)
def test_a_wrong_list_of_trackers(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([TINY, override, "--print-config"]) == 2
    assert message in capsys.readouterr().err


def state(run_dir: Path, name: str) -> str:
    file = run_dir / "trackers" / f"{name}.json"
    return file.read_text() if file.exists() else ""

"""Every tracker's own library reads back what a run wrote; none of them can slow, stop or keep a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_ext.config.schema import Tracker
from megatron_ext.metrics.tracker_backends import BACKENDS, PROJECT
from megatron_ext.metrics.writer import METRICS, SAMPLES, read_steps

ROOT = Path(__file__).parents[2]
TINY = "recipes/tiny/tiny-cpu.toml"
SECRET = "hunter2hunter2hunter2"
SMALL = ["parallel.ranks_per_node=1", "parallel.tensor=1", "rollout.prompts=8", "train.mini_batch_prompts=8"]
CHOICES = (*("WANDB_", "MLFLOW_", "SWANLAB_", "TRACKIO_"), "HF_TOKEN")  # what a user may have set
Steps = dict[int, dict[str, float]]


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a user who has chosen nothing and has no account."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(CHOICES)}
    return kept | {"PYTHONPATH": str(ROOT), "HOME": str(home), **more}


def finish(folder: Path, *overrides: str) -> str:
    """A tiny run by its command, with every tracker; what it says."""
    names = json.dumps(list(BACKENDS))
    command = [sys.executable, "-m", "tools.train", TINY, f"log.dir={folder}", "name=a/run", f"log.trackers={names}"]
    command += [*SMALL, "data.max_prompt_tokens=128", "rollout.max_response_tokens=8", "checkpoint.every=2"]
    command += [f'data.hub="https://user:{SECRET}@host/data"', *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def last_step(run: Path, name: str) -> int:
    file = run / "trackers" / f"{name}.json"
    return json.loads(file.read_text())["step"] if file.exists() else 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose trackers know step 3 when it goes on after step 2, and that ends with step 4."""
    folder = tmp_path_factory.mktemp("tracked")
    run = folder / "a" / "run"

    def until(step: int) -> None:
        for _ in range(20):  # on a busy machine a tracker may need more time than the end of a run grants
            said = finish(folder, f"train.steps={step}")
            assert "is off" not in said and "failed" not in said, said
            if all(last_step(run, name) == step for name in BACKENDS):
                return
            assert "did not finish within" in said, said
        raise AssertionError("a tracker never finished")

    until(3)
    newest = run / "checkpoints" / "step_000003"
    newest.rename(run / "checkpoints" / "damaged")
    until(4)
    return run


def tensorboard_steps(run: Path) -> Steps:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    texts = {e.step: e.tensor_proto.string_val for e in board.Tensors("samples")}
    for step in expected_samples(run):
        check_texts(run, step, [text.decode() for text in texts[step]])
    configs = [tensor.tensor_proto.string_val[0].decode() for tensor in board.Tensors("config")]
    check_config(run, json.loads(configs[-1].removeprefix("```json\n").removesuffix("```")))
    steps: Steps = {}
    for key in board.Tags()["scalars"]:
        for event in board.Scalars(key):
            assert key not in steps.setdefault(event.step, {})
            steps[event.step][key] = event.value
    return steps


def sessions(folder: Path, pattern: str) -> list[Path]:
    """The files of one id that was written in several sessions, in their order."""
    files = sorted(folder.glob(pattern))
    assert len({file.name for file in files}) == 1 < len(files)
    return files


def wandb_steps(run: Path) -> Steps:
    from swanlab.converter.wb.wbdatastore import WBDataStoreReader
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    steps: Steps = {}
    for file in sessions(run / "wandb", "offline-run-*/*.wandb"):
        with WBDataStoreReader() as reader:
            reader.open(file)
            while (data := reader.scan()) is not None:
                record = Record()
                record.ParseFromString(data)
                if record.HasField("run"):
                    config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                    config.pop("_wandb")
                    check_config(run, config)
                if record.HasField("history"):
                    step = record.history.step.num
                    items = {"/".join([item.key, *item.nested_key]).strip("/"): item for item in record.history.item}
                    assert step not in steps
                    steps[step] = {
                        key: json.loads(item.value_json) for key, item in items.items() if not key.startswith("_")
                    }
                    path = steps[step]["samples/path"]
                    check_table(run, step, json.loads((file.parent / "files" / str(path)).read_text()))
                    steps[step] = {k: v for k, v in steps[step].items() if not k.startswith("samples/")}
    return steps


def mlflow_steps(run: Path) -> Steps:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "a/run"
    assert found.data.params["optimizer.lr"] == str(written_config(run)["optimizer"]["lr"])
    assert found.data.params["data.hub"] == "https://***@host/data"
    steps: Steps = {}
    for key in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, key):
            assert key not in steps.setdefault(metric.step, {})
            steps[metric.step][key] = metric.value
    artifacts = Path(str(found.info.artifact_uri).removeprefix("file://"))
    check_config(run, json.loads((artifacts / "config.json").read_text()))
    for step in steps:
        check_table(run, step, json.loads((artifacts / "samples" / f"step_{step:06d}.json").read_text()))
    return steps


def swanlab_steps(run: Path) -> Steps:
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    steps: Steps = {}
    for file in sessions(run / "swanlab", "run-*/*.swanlab"):
        config = yaml.safe_load((file.parent / "files" / "config.yaml").read_text())
        check_config(run, {key: item["value"] for key, item in config.items()})
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record.FromString(data)
            if record.HasField("scalar") and not record.scalar.key.startswith("__swanlab__"):  # the machine's load
                scalar = record.scalar
                assert scalar.key not in steps.setdefault(scalar.step, {})
                steps[scalar.step][scalar.key] = scalar.value.number
            if record.HasField("media"):
                shown = [file.parent / "media" / "text" / item.filename for item in record.media.value.items]
                check_texts(run, record.media.step, [path.read_text() for path in shown])
        reader.close()
    return steps


def trackio_steps(run: Path) -> Steps:
    code = f"""
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs({PROJECT!r})
json.dump([run.config, SQLiteStorage.get_logs({PROJECT!r}, run.name)], sys.stdout, default=str)
"""
    command = [sys.executable, "-c", code]
    env = environment(run, TRACKIO_DIR=str(run / "trackio"))
    config, logs = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    check_config(run, {key: value for key, value in config.items() if not key.startswith("_")})
    steps: Steps = {}
    for log in logs:
        step, table = log.pop("step"), log.pop("samples")
        rows = table["_value"]
        check_table(run, step, {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]})
        assert step not in steps
        steps[step] = {key: value for key, value in log.items() if key != "timestamp"}
    return steps


READERS: dict[str, Callable[[Path], Steps]] = {
    "tensorboard": tensorboard_steps,
    "wandb": wandb_steps,
    "mlflow": mlflow_steps,
    "swanlab": swanlab_steps,
    "trackio": trackio_steps,
}


def written_config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def check_config(run: Path, found: dict[str, Any]) -> None:
    """The run's, but for its length, which differs between the sessions."""
    expected = written_config(run)
    assert expected["data"]["hub"] == "https://***@host/data"
    for config in (expected, found):
        config["train"] = {key: value for key, value in config["train"].items() if key != "steps"}
    assert found == expected


def expected_samples(run: Path) -> dict[int, list[dict[str, Any]]]:
    samples: dict[int, list[dict[str, Any]]] = {}
    for sample in read_steps(run / SAMPLES):
        samples.setdefault(sample["step"], []).append(sample)
    return samples


def check_texts(run: Path, step: int, texts: list[str]) -> None:
    samples = expected_samples(run)[step]
    assert len(texts) == len(samples) > 0
    for text, sample in zip(texts, samples, strict=True):
        for shown in ("".join(sample["tokens"]), sample["prompt"]):
            assert "".join(f"    {line}\n" for line in shown.splitlines()) in text + "\n"


def check_table(run: Path, step: int, table: dict[str, Any]) -> None:
    samples = expected_samples(run)[step]
    assert len(table["data"]) == len(samples) > 0
    for row, sample in zip(table["data"], samples, strict=True):
        found = dict(zip(table["columns"], row, strict=True))
        assert found.pop("response") == "".join(sample["tokens"])
        assert found == {key: sample[key] for key in found} and {"prompt", "reward", "answer"} <= found.keys()


@pytest.mark.parametrize("name", get_args(Tracker))
def test_a_tracker_holds_every_step_once_with_samples_and_configuration(run: Path, name: str) -> None:
    found = READERS[name](run)
    expected = {record.pop("step"): record for record in read_steps(run / METRICS)}
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    for step, record in expected.items():
        # step 3 was computed by two sessions: what the machine's speed decides differs
        skipped = ("time/", "speed/") if step == 3 else ()
        values = {key: value for key, value in record.items() if value is not None and not key.startswith(skipped)}
        logged = {key: value for key, value in found[step].items() if not key.startswith(skipped)}
        assert logged == pytest.approx(values, rel=1e-6, abs=1e-30), step


def test_no_secret_reaches_a_tracker(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []

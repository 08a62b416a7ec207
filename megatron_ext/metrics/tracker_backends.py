"""The experiment trackers' libraries behind one interface. Each class imports its own library, none is a dependency.

Each writes into the run's folder unless the user's environment names a server: W&B and SwanLab by ``*_MODE``, or by a
key and a server that answers; MLflow by MLFLOW_TRACKING_URI; Trackio by TRACKIO_SPACE_ID or TRACKIO_SERVER_URL.
Values are numbers under names such as ``reward/mean``; samples are records of ``samples.jsonl``.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.config.redact import redact_text

PROJECT = "megatron-entropy"
SAMPLE_COLUMNS = ("problem_id", "prompt", "response", "answer", "extracted", "reward", "outcome")
ANSWER_S = 5.0  # within which a server counts as reachable
_PARAMS_AT_ONCE = 100  # MLflow's limits
_PARAM_LENGTH = 6000

Values = Mapping[str, float]
Samples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Session:
    """What a tracker is opened with. ``id`` is that of the run to go on with, empty for a new one."""

    run_dir: Path
    name: str
    config: Mapping[str, Any]  # without secrets
    id: str
    first_step: int  # that will be logged


class Tracker(Protocol):
    id: str

    def log(self, step: int, values: Values, samples: Samples) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in ``tensorboard/``; what an earlier start wrote of the steps to come is not shown any more."""

    id = "tensorboard"

    def __init__(self, session: Session):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text = Event, Summary, text_pb
        self._writer = EventFileWriter(str(session.run_dir / "tensorboard"))
        begin = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=session.first_step, session_log=begin))
        self._add(session.first_step - 1, text_pb("config", f"```json\n{json.dumps(session.config, indent=1)}\n```"))

    def log(self, step: int, values: Values, samples: Samples) -> None:
        scalars = [self._summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._add(step, self._summary(value=scalars))
        if samples:
            self._add(step, self._text("samples", [_markdown(sample) for sample in samples]))
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))


class Wandb:
    """Weights & Biases; offline, ``wandb sync --append`` uploads what ``wandb/`` holds of a run."""

    def __init__(self, session: Session):
        import wandb
        from requests.utils import get_netrc_auth

        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        has_key = bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(server))
        self.id = session.id or secrets.token_hex(4)
        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=session.name,
            id=self.id,
            resume="allow",
            dir=str(session.run_dir),
            mode=os.environ.get("WANDB_MODE") or ("online" if has_key and _answers(server) else "offline"),  # type: ignore[arg-type]
            config=dict(session.config),
            settings=wandb.Settings(
                console="off", save_code=False, disable_git=True
            ),  # a remote's URL may hold a token
        )

    def log(self, step: int, values: Values, samples: Samples) -> None:
        record: dict[str, Any] = dict(values)
        if samples:
            record["samples"] = self._table(columns=list(SAMPLE_COLUMNS), data=_rows(samples))
        self._run.log(record, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A SQLite store in ``mlflow/``, or the server at MLFLOW_TRACKING_URI."""

    def __init__(self, session: Session):
        import mlflow.entities
        from mlflow.tracking import MlflowClient

        self._metric = mlflow.entities.Metric
        folder = (session.run_dir / "mlflow").resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            folder.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        if session.id:
            self.id = session.id
            self._client.update_run(self.id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            where = None if uri else (folder / "artifacts").as_uri()
            identity = experiment.experiment_id if experiment else self._client.create_experiment(name, where)
            self.id = self._client.create_run(identity, run_name=session.name).info.run_id
            params = [
                mlflow.entities.Param(key, str(value)[:_PARAM_LENGTH]) for key, value in _flat(session.config).items()
            ]
            for first in range(0, len(params), _PARAMS_AT_ONCE):
                self._client.log_batch(self.id, params=params[first : first + _PARAMS_AT_ONCE])
        self._client.log_dict(self.id, dict(session.config), "config.json")

    def log(self, step: int, values: Values, samples: Samples) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [self._metric(key, value, now, step) for key, value in values.items()])
        if samples:
            table = {"columns": list(SAMPLE_COLUMNS), "data": _rows(samples)}
            self._client.log_dict(self.id, table, f"samples/step_{step:06d}.json")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class SwanLab:
    """``swanlab/``; offline, ``swanlab sync`` uploads what it holds."""

    def __init__(self, session: Session):
        import swanlab

        folder = session.run_dir / "swanlab"
        folder.mkdir(exist_ok=True)
        settings = swanlab.Settings()
        online = settings.api_key and _answers(settings.api_host)
        self.id = session.id or secrets.token_hex(10)
        swanlab.merge_settings({"probe": {"git": False, "runtime": False}, "terminal": {"proxy_type": "none"}})
        self._swanlab = swanlab
        swanlab.init(
            project=settings.project.name or PROJECT,
            name=session.name,
            id=self.id,
            resume="allow",
            log_dir=str(folder),
            mode=None if os.environ.get("SWANLAB_MODE") else ("online" if online else "offline"),
            config=dict(session.config),
        )

    def log(self, step: int, values: Values, samples: Samples) -> None:
        record: dict[str, Any] = dict(values)
        if samples:
            record["samples"] = [self._swanlab.Text(_markdown(sample)) for sample in samples]
        self._swanlab.log(record, step=step)

    def close(self, *, failed: bool) -> None:
        if failed:
            self._swanlab.finish(state="crashed", error="the run ended with an error")
        else:
            self._swanlab.finish()


class Trackio:
    """A database in ``trackio/``, or where the TRACKIO_* variables say. Trackio finds a run by its name."""

    def __init__(self, session: Session):
        os.environ.setdefault("TRACKIO_DIR", str(session.run_dir.resolve() / "trackio"))
        import trackio

        self._trackio = trackio
        self.id = session.id or f"{session.name}-{secrets.token_hex(4)}"
        trackio.init(PROJECT, name=self.id, resume="allow", config=dict(session.config), embed=False)

    def log(self, step: int, values: Values, samples: Samples) -> None:
        record: dict[str, Any] = dict(values)
        if samples:
            record["samples"] = self._trackio.Table(columns=list(SAMPLE_COLUMNS), data=_rows(samples))
        self._trackio.log(record, step=step)

    def close(self, *, failed: bool) -> None:
        self._trackio.finish()


BACKENDS: dict[str, Callable[[Session], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "swanlab": SwanLab,
    "trackio": Trackio,
}


def _rows(samples: Samples) -> list[Any]:
    """A row of SAMPLE_COLUMNS for each sample, without secrets: a model may repeat one, token by token."""
    rows = [
        ["".join(sample["tokens"]) if name == "response" else sample.get(name) for name in SAMPLE_COLUMNS]
        for sample in samples
    ]
    return [[redact_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]


def _markdown(sample: Mapping[str, Any]) -> str:
    (row,) = _rows([sample])
    found = dict(zip(SAMPLE_COLUMNS, row, strict=True))
    title = f"**{found['problem_id']}**: reward {found['reward']}, {found['outcome']}"
    texts = (f"{name}:\n\n" + _indented(found[name]) for name in ("prompt", "response", "extracted", "answer"))
    return "\n\n".join((title, *texts))


def _indented(text: object) -> str:
    """Markdown's code block: what a model writes is shown as it is."""
    return "\n".join(f"    {line}" for line in str(text).splitlines())


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _answers(server: str) -> bool:
    """Whether anything answers at a URL, through the user's proxies."""
    try:
        urllib.request.urlopen(server, timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True

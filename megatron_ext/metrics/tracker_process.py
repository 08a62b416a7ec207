"""One tracker's process: follows a run's files and gives each step to the tracker's library.

    python -m megatron_ext.metrics.tracker_process RUN_DIR NAME RESUME_STEP      (started by trackers.py)

Standard input is a pipe from the run: it brings ``done`` or ``failed`` when the run ends. It closes without a word when
the run is killed; then this process ends too, even if its library hangs. Whatever goes wrong here is written to
standard output, the tracker's log, and ends this process alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.metrics.tracker_backends import BACKENDS, Session
from megatron_ext.metrics.trackers import FOLDER
from megatron_ext.metrics.writer import CONFIG, METRICS, SAMPLES

POLL_S = 0.5
NICENESS = 5
QUIET = {  # nothing about the run goes anywhere but to the tracker, unless the user's environment says otherwise
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the run, which says when to end
    run_dir, name, resume_step = sys.argv[1:]
    words: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(words,), daemon=True).start()
    os.nice(NICENESS)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    follow(Path(run_dir), name, int(resume_step), words)


def follow(run_dir: Path, name: str, resume_step: int, words: queue.Queue[str]) -> None:
    """Log every step of the files that the tracker does not have yet, until the run's last word."""
    state_file = run_dir / FOLDER / f"{name}.json"
    state, is_new = {"id": "", "step": 0}, True
    if resume_step and state_file.exists():
        state, is_new = json.loads(state_file.read_text()), False
    config = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))
    tracker = BACKENDS[name](Session(run_dir, str(config.get("name", "run")), config, state["id"], state["step"] + 1))
    state["id"] = tracker.id
    _write(state_file, state)
    metrics, samples, word = _Tail(run_dir / METRICS), _Tail(run_dir / SAMPLES), ""
    while not word:
        with contextlib.suppress(queue.Empty):
            word = words.get(timeout=POLL_S)  # what is logged below is then complete
        for record in metrics.until(math.inf):
            step = record.pop("step")
            texts = [sample for sample in samples.until(step) if sample["step"] == step]
            if step <= state["step"] and not (is_new and step == 0):
                continue  # a resumed run computes these again, with the same result
            values = {key: value for key, value in record.items() if value is not None}
            tracker.log(step, values, texts)
            state["step"] = step
            _write(state_file, state)
    tracker.close(failed=word == "failed")


class _Tail:
    """The objects of a JSON Lines file that grows, each once."""

    def __init__(self, path: Path):
        self._file = path.open("rb")

    def until(self, step: float) -> Iterator[dict[str, Any]]:
        """Those of complete lines up to ``step`` that are there by now."""
        while True:
            start, line = self._file.tell(), self._file.readline()
            if not line.endswith(b"\n") or (record := json.loads(line))["step"] > step:
                self._file.seek(start)
                return
            yield record


def _listen(words: queue.Queue[str]) -> None:
    """Pass the run's last word on; without one the run was killed, and nothing more is waited for."""
    word = sys.stdin.readline().strip()
    if not word:
        os._exit(1)
    words.put(word)


def _write(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()

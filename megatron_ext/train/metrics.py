"""What a run leaves behind for people: its files, its clock and its live display.

Files of a run's folder: ``config.json`` (redacted), ``metrics.jsonl`` (one flat JSON object per step),
``samples.jsonl`` (a few responses per step, token by token) and ``tensorboard/``. Steps count from 1.
Everything under ``time/`` and ``speed/`` depends on the machine; every other key is a function of the
configuration and the seed, so two runs can be compared bit for bit (tools/compare_runs.py).
Only rank 0 builds a MetricsWriter; every rank may build a Watch, with ``show`` on rank 0 alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_ext import heartbeat
from megatron_ext.train.redact import redact

if TYPE_CHECKING:
    from megatron_ext.types import Episode

CONFIG, METRICS, SAMPLES, TENSORBOARD = "config.json", "metrics.jsonl", "samples.jsonl", "tensorboard"
CLOCK_KEYS = ("time/", "speed/")
HEADLINES = {
    "reward": "reward/mean",
    "entropy": "entropy/full",
    "nucleus": "entropy/nucleus",
    "selected": "siren/selected_share",
    "loss": "loss/total",
    "grad": "grad/norm",
    "clipped": "clip/high",
    "length": "response/length",
    "cut": "response/truncated",
    "seconds": "time/step_s",
}


# --- files ---


class MetricsWriter:
    """Appends one line per step to ``metrics.jsonl``, synced to disk, and mirrors it to TensorBoard.

    Resuming after step ``resume_step`` removes what later steps wrote and a half-written last line, so a run
    that was killed and resumed leaves the file an uninterrupted one leaves. Write a step before its checkpoint:
    what the checkpoint promises is then on disk. ``resume_step`` 0 starts the files anew.

    NaN and infinity are written as ``null``: valid JSON has neither, and a column stays numbers or missing.
    Raises ValueError when the file to resume holds a line that is not a step, other than the last, when its steps do
    not increase by one, or when it ends before ``resume_step``. One that is not there begins anew; ``lines`` says so.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool, total_steps: int, resume_step: int = 0):
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._samples = folder / METRICS, folder / SAMPLES
        self.lines: list[str] = []
        if resume_step:
            first = _check_steps(self._metrics, resume_step)
            if first > 1:
                self.lines.append(f"{self._metrics}: steps before {first} are not in it: the file was moved away")
        for path in (self._metrics, self._samples):
            path.touch()
            _cut_after(path, resume_step)
        _sync_folder(folder)
        self._last, self._total = resume_step, total_steps
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only when asked for

            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append a step: flat metrics and ``sample_record`` objects. On return they survive a kill."""
        assert self._last < step <= self._total, (self._last, step, self._total)
        self._last = step
        values = {key: _number(value) for key, value in metrics.items()}
        _append(self._samples, [{"step": step, **sample} for sample in samples])
        _append(self._metrics, [{"step": step} | {key: _or_null(value) for key, value in values.items()}])
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_steps(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of ``metrics.jsonl`` or ``samples.jsonl``, streamed; a half-written last line is left out.

    Raises ValueError naming the line when one in the middle is not a JSON object with a ``step``.
    """
    return (record for record, _ in _lines(Path(path)))


def write_config(run_dir: str | Path, config: Mapping[str, Any]) -> None:
    """Write the run's configuration (``config.model_dump(mode="json")``) for the report, without its secrets."""
    target = Path(run_dir) / CONFIG
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(redact(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def sample_record(
    episode: Episode, tokens: Sequence[str], entropy: Sequence[float], logprob: Sequence[float]
) -> dict[str, Any]:
    """One response for ``samples.jsonl``: a text, an entropy in nats and a log-probability for each token.

    ``tokens`` comes from ``token_texts``; the numbers are rounded to 4 decimals. Raises ValueError when the
    three differ in length.
    """
    if not len(tokens) == len(entropy) == len(logprob):
        raise ValueError(f"sample: {len(tokens)} tokens, {len(entropy)} entropies, {len(logprob)} log-probabilities")
    return {
        "problem_id": episode.problem.problem_id,
        "prompt": episode.problem.prompt,
        "answer": episode.problem.answer,
        "extracted": episode.reward.extracted,
        "reward": _or_null(episode.reward.value),
        "outcome": episode.reward.outcome,
        "truncated": episode.sample.truncated,
        "group": episode.group,
        "tokens": list(tokens),
        "entropy": [_or_null(round(float(value), 4)) for value in entropy],
        "logprob": [_or_null(round(float(value), 4)) for value in logprob],
    }


def token_texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Each token's share of the text; their concatenation is ``decode(ids)``.

    A character that spans several tokens belongs to the last of them, the others get an empty text. Decoding
    needs the previous character's tokens as context (leading spaces), hence a window and not a token alone.
    """
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        known, now = decode(ids[start:read]), decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(known) :])
        start, read = read, end
    return texts


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each complete line's object and the offset behind it."""
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return  # killed while writing
            end += len(raw)
            try:
                record = json.loads(raw)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError("no object with an integer step")
            except ValueError as error:
                if not file.peek(1):
                    return
                raise ValueError(
                    f"{path}, line {number}: {error}; found {raw[:60]!r}. Repair the line or move the file away"
                ) from None
            yield record, end


def _check_steps(path: Path, resume_step: int) -> int:
    """The first step that the file has, or will have. Raises ValueError unless it goes on to ``resume_step``."""
    first = last = 0
    for record, _ in _lines(path) if path.exists() else ():
        step = record["step"]
        if last and step != last + 1:
            raise ValueError(
                f"{path}: step {step} follows step {last}, expected {last + 1}: lines were lost, or two runs wrote to "
                "it; restore the file, or move it away and the run goes on with a new one"
            )
        first, last = first or step, step
        if last >= resume_step:
            break
    if path.exists() and last != resume_step:
        raise ValueError(
            f"{path}: its last step is {last}, but the checkpoint to go on from is of step {resume_step}: lines were "
            "lost; restore the file, or move it away and the run goes on with a new one"
        )
    return first or resume_step + 1


def _cut_after(path: Path, step: int) -> None:
    """Remove the lines of later steps and an incomplete last line. Steps increase: what goes is a suffix."""
    keep = 0
    for record, end in _lines(path) if step else ():
        if record["step"] > step:
            break
        keep = end
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    with path.open("ab") as file:
        file.write(text.encode("utf-8", "replace"))  # a model can emit half a surrogate pair
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new file's name is safe only when its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(value: Any) -> float | int:
    return value if isinstance(value, int) else float(value)


def _or_null(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


# --- clock and display ---


class Phase:
    """Handle of a running phase: ``advance`` moves its bar and counts its tokens."""

    def __init__(self, name: str, progress: Progress | None, task: TaskID | None):
        self.name, self.tokens = name, 0
        self._progress, self._task = progress, task

    def advance(self, count: int = 1, *, tokens: int = 0) -> None:
        self.tokens += tokens
        heartbeat.progress()
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)


class Watch:
    """The run's clock, and on a terminal its live display; without a terminal one line per step.

        with Watch(total_steps=100) as watch:
            with watch.phase("rollout", total=64) as phase:
                phase.advance(1, tokens=812)
            metrics |= watch.times()  # time/rollout_s, speed/rollout_tokens_per_s, time/step_s
            watch.step(1, metrics)

    A phase entered several times in a step adds up. The clock is the host's: a phase must end with the device
    idle (reading one of its results is enough). ``show=False`` keeps the clock and prints nothing. What it times is
    where the rank is for its launcher (megatron_ext/heartbeat.py).
    """

    def __init__(
        self,
        total_steps: int,
        *,
        resume_step: int = 0,
        title: str = "training",
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._total, self._done, self._title, self._clock = total_steps, resume_step, title, clock
        self._console = console or Console()
        self._show, self._is_live = show, show and self._console.is_terminal
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._step_start = clock()
        self._paces: deque[float] = deque(maxlen=20)  # seconds of the last steps, for the ETA
        self._rows: deque[tuple[int, dict[str, float]]] = deque(maxlen=8)
        self._live: Live | None = None
        bar = (TextColumn("{task.description:<14}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn())
        self._steps = Progress(*bar, TextColumn("ETA {task.fields[eta]}"), console=self._console, expand=True)
        self._phases = Progress(*bar, TimeElapsedColumn(), console=self._console, expand=True)

    def __enter__(self) -> Watch:
        self._step_start = self._last_step = self._clock()
        heartbeat.enter(heartbeat.BETWEEN, step=self._done + 1)
        if self._is_live:
            self._steps.add_task(self._title, total=self._total, completed=self._done, eta="-")
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        heartbeat.enter(heartbeat.END, step=0)
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Time a part of the step; ``total`` is what its bar counts to."""
        task = self._phases.add_task(name, total=total) if self._live is not None else None
        phase = Phase(name, self._phases, task)
        start = self._clock()
        try:
            with heartbeat.phase(name):
                yield phase
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start
            self._tokens[name] = self._tokens.get(name, 0) + phase.tokens
            if task is not None:
                self._phases.stop_task(task)

    def count(self, name: str, seconds: float) -> None:
        """Add what was spent on a part elsewhere, beside the step."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def times(self) -> dict[str, float]:
        """``time/<phase>_s``, ``speed/<phase>_tokens_per_s`` and ``time/step_s`` since the last call; starts anew."""
        now = self._clock()
        found = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        for name, tokens in self._tokens.items():
            if tokens and self._seconds[name] > 0:
                found[f"speed/{name}_tokens_per_s"] = tokens / self._seconds[name]
        found["time/step_s"] = now - self._step_start
        self._seconds, self._tokens, self._step_start = {}, {}, now
        return found

    def step(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Show a finished step."""
        now = self._clock()
        self._paces.append((now - self._last_step) / max(1, step - self._done))
        self._last_step, self._done = now, step
        heartbeat.enter(heartbeat.BETWEEN, step=step + 1)
        self._rows.append((step, {name: float(metrics[key]) for name, key in HEADLINES.items() if key in metrics}))
        if self._live is not None:
            for task in list(self._phases.task_ids):
                self._phases.remove_task(task)
            self._steps.update(self._steps.task_ids[0], completed=step, eta=self.eta())
            self._live.update(self._picture())
        elif self._show:
            figures = "  ".join(f"{name} {_short(value)}" for name, value in self._rows[-1][1].items())
            line = f"{self._title} {step}/{self._total}  {figures}  ETA {self.eta()}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def eta(self) -> str:
        """Time left at the pace of the last steps, ``h:mm:ss``."""
        if not self._paces:
            return "-"
        left = round(sum(self._paces) / len(self._paces) * (self._total - self._done))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    def _picture(self) -> Group:
        names = [name for name in HEADLINES if any(name in row for _, row in self._rows)]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("step", *names):
            table.add_column(name, justify="right", style="bold green" if name == "reward" else "")
        for step, row in self._rows:
            table.add_row(str(step), *(_short(row[name]) if name in row else "" for name in names))
        return Group(self._steps, self._phases, table)


def _short(value: float) -> str:
    """Four significant digits, never longer than a column."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"

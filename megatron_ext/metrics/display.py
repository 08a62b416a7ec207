"""The clock of a run and its live display: on a terminal bars and a table, elsewhere one line per step.

Every rank has a Watch, whose times are its metrics under ``time/`` and ``speed/``; with ``show`` on rank 0 alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import SupportsFloat

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from megatron_ext import heartbeat
from megatron_ext.metrics.glossary import GLOSSARY, Glossary
from megatron_ext.metrics.spans import BESIDE, WAITING, Span

GAP = 2  # columns of a terminal between two of the table


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


class _Count(ProgressColumn):
    """How much is done of how much; nothing for what is not counted."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}", justify="right")


class Watch:
    """The run's clock, and on a terminal its live display; without a terminal one line per step.

        with Watch(total_steps=100) as watch:
            with watch.phase("rollout", total=64) as phase:
                phase.advance(1, tokens=812)
            metrics |= watch.times()  # time/rollout_s, speed/rollout_tokens_per_s, time/step_s
            watch.step(1, metrics)

    A phase entered several times in a step adds up; each of its spans is kept for the timeline. Its speed is that of
    the times in which it had tokens: a wait has none. The ``clock`` is the host's: a phase must end with the device
    idle (reading one of its results is enough). ``show=False`` keeps the clock and prints nothing. What it times is
    where the rank is for its launcher (megatron_ext/heartbeat.py).
    """

    def __init__(
        self,
        total_steps: int,
        *,
        resume_step: int = 0,
        title: str = "training",
        glossary: Glossary = GLOSSARY,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._total, self._done, self._title, self.clock = total_steps, resume_step, title, clock
        self._headlines = {metric.short: metric.name for metric in glossary.metrics if metric.short}
        self._console = console or Console()
        self._show, self._is_live = show, show and self._console.is_terminal
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, tuple[int, float]] = {}  # and the seconds in which they came
        self._spans: list[Span] = []
        self._step_start = self._origin = clock()
        self._paces: deque[float] = deque(maxlen=20)  # seconds of the last steps, for the ETA
        self._steps_shown: deque[tuple[int, dict[str, float]]] = deque(maxlen=8)
        self._live: Live | None = None
        bar = (TextColumn("{task.description:<14}", markup=False), BarColumn(bar_width=None), _Count())
        self._steps = Progress(*bar, TextColumn("ETA {task.fields[eta]}"), console=self._console, expand=True)
        self._phases = Progress(*bar, TimeElapsedColumn(), console=self._console, expand=True)

    def __enter__(self) -> Watch:
        self._step_start = self._last_step = self._origin = self.clock()
        heartbeat.enter(heartbeat.BETWEEN, step=self._done + 1)
        if self._is_live:
            self._steps.add_task(self._title, total=self._total, completed=self._done, eta="-")
            self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)
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
        start = self.clock()
        try:
            with heartbeat.phase(name):
                yield phase
        finally:
            end = self._add_span(name, start)
            self.count(name, end - start, tokens=phase.tokens)
            if task is not None:
                self._phases.stop_task(task)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait for other ranks, within a phase, whose time goes on, or between two."""
        start = self.clock()
        try:
            yield
        finally:
            self._add_span(WAITING, start)

    def _add_span(self, name: str, start: float) -> float:
        """Returns the time."""
        end = self.clock()
        self._spans.append(Span(name, start - self._origin, end - self._origin))
        return end

    def restart(self) -> None:
        """All ranks have just met: what follows is told in seconds from now, by ``take_spans``."""
        self._spans, self._origin = [], self.clock()

    def take_spans(self) -> list[Span]:
        """The phases and waits since ``restart`` or the last call, in the order in which they ended."""
        found, self._spans = self._spans, []
        return found

    def count(self, name: str, seconds: float, *, tokens: int = 0) -> None:
        """Add what was spent on a part, here or elsewhere, beside the step."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if tokens:
            before = self._tokens.get(name, (0, 0.0))
            self._tokens[name] = before[0] + tokens, before[1] + seconds

    def beside(self, begin: float, end: float) -> None:
        """Tell the timeline when, by the clock, a second thread has generated."""
        self._spans.append(Span(BESIDE, begin - self._origin, end - self._origin))

    def times(self) -> dict[str, float]:
        """``time/<phase>_s``, ``speed/<phase>_tokens_per_s`` and ``time/step_s`` since the last call; starts anew."""
        now = self.clock()
        found = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        for name, (tokens, seconds) in self._tokens.items():
            if seconds > 0:
                found[f"speed/{name}_tokens_per_s"] = tokens / seconds
        found["time/step_s"] = now - self._step_start
        self._seconds, self._tokens, self._step_start = {}, {}, now
        return found

    def step(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Show a finished step."""
        now = self.clock()
        self._paces.append((now - self._last_step) / max(1, step - self._done))
        self._last_step, self._done = now, step
        heartbeat.enter(heartbeat.BETWEEN, step=step + 1)
        shown = {name: float(metrics[key]) for name, key in self._headlines.items() if key in metrics}
        self._steps_shown.append((step, shown))
        if self._live is not None:
            for task in list(self._phases.task_ids):
                self._phases.remove_task(task)
            self._steps.update(self._steps.task_ids[0], completed=step, eta=self.eta())
            self._live.refresh()
        elif self._show:
            figures = "  ".join(f"{name} {_short(value)}" for name, value in shown.items())
            line = f"{self._title} {step}/{self._total}  {figures}  ETA {self.eta()}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def eta(self) -> str:
        """Time left at the pace of the last steps, ``h:mm:ss``."""
        if not self._paces:
            return "-"
        left = round(sum(self._paces) / len(self._paces) * (self._total - self._done))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    def _picture(self) -> Group:
        return Group(self._steps, self._phases, _table(list(self._steps_shown), self._headlines, self._console.width))


def _table(steps: Sequence[tuple[int, Mapping[str, float]]], headlines: Iterable[str], width: int) -> Table:
    """The last steps' headlines, in the glossary's order: the first that fit in ``width``, each number whole."""
    names = [name for name in headlines if any(name in values for _, values in steps)]
    columns = {"step": [str(step) for step, _ in steps]}
    columns |= {name: [_short(values[name]) if name in values else "" for _, values in steps] for name in names}
    needed = {name: max(map(len, (name, *cells))) for name, cells in columns.items()}
    for name in reversed(names[1:]):
        if sum(needed.values()) + GAP * (len(needed) - 1) > width:
            needed.pop(name)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for name in needed:
        table.add_column(name, justify="right", style="bold green" if name == "reward" else "", no_wrap=True)
    for cells in zip(*(columns[name] for name in needed), strict=True):
        table.add_row(*cells)
    return table


def _short(value: float) -> str:
    """Four significant digits, never longer than a column."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"

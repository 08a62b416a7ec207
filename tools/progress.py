"""Progress of a tool: bars on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_S = 15.0  # at least, between two lines of a task ...
LINE_SHARE = 0.01  # ... and this much of it done between them: neither silence nor thousands of lines


class ToolProgress(Progress):
    """rich's Progress; without a terminal ``advance`` prints a line when the task is due for one, and at its end."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic):
        columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=None), MofNCompleteColumn())
        is_live = console.is_terminal
        super().__init__(*columns, TimeRemainingColumn(), console=console, disable=not is_live, get_time=clock)
        self._said: dict[TaskID, tuple[float, float]] = {}  # when, and how much was done
        self._at_start: dict[TaskID, float] = {}  # what was there before: it took no time

    def add_task(self, *arguments: Any, **options: Any) -> TaskID:
        task_id = super().add_task(*arguments, **options)
        self._at_start[task_id] = self._tasks[task_id].completed
        return task_id

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        task = self._tasks[task_id]
        if not self.disable or not task.total or task.start_time is None:
            return
        now, done = self.get_time(), task.completed
        when, before = self._said.get(task_id, (task.start_time, 0.0))
        if done < task.total and (now - when < LINE_S or done - before < LINE_SHARE * task.total):
            return
        self._said[task_id] = now, done
        new = done - self._at_start.get(task_id, 0)
        left = (now - task.start_time) / new * (task.total - done) if new else 0
        rest = f", {timedelta(seconds=round(left))} left" if left else ""
        line = f"{task.description}: {done:.0f} of {task.total:.0f}{rest}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

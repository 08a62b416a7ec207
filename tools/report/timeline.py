"""The timeline of three steps of a run: the first, the median and the slowest of the others, drawn and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from megatron_ext.files import read_lines
from megatron_ext.metrics.spans import (
    BESIDE,
    WAITING,
    Span,
    beside_and_waited,
    busy_seconds,
    idle_shares,
    phase_idle_share,
)
from megatron_ext.metrics.writer import STEP_OF_TIMELINE, TIMELINE

from ..charts import figure, short
from ..timeline_chart import MOST_ROWS, timeline_chart, timeline_legend
from .data import Metrics, Record, first_fault

Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class Line(Record):
    """A line of ``timeline.jsonl`` (metrics/writer.py::MetricsWriter.write_timeline)."""

    step: int
    names: list[str]
    ranks: Annotated[list[list[tuple[Annotated[int, Field(ge=0)], Seconds, Seconds]]], Field(min_length=1)]


@dataclass(frozen=True)
class Step:
    """A step of the timeline, and why it is shown."""

    number: int
    why: str
    ranks: Sequence[Sequence[Span]]


def timeline(folder: Path, metrics: Metrics) -> str:
    """HTML; nothing where the run has no timeline. Raises ValueError where the file is damaged."""
    chosen = choose(metrics)
    steps = [Step(number, chosen[number], ranks) for number, ranks in read_timeline(folder / TIMELINE, chosen).items()]
    if not steps:
        return ""
    steps.sort(key=lambda step: list(chosen).index(step.number))
    names = dict.fromkeys(span.name for step in steps for spans in step.ranks for span in spans)
    colors = {name: number for number, name in enumerate(name for name in names if name != WAITING)}
    pictures = [_figure(step, colors) for step in steps]
    return (
        f'<h2>Timeline</h2><p class="sub">{escape(_introduction(len(steps[0].ranks), BESIDE in colors))}</p>'
        f'<div class="charts">{"".join(pictures)}</div>{_table(steps, list(colors))}'
    )


def choose(metrics: Metrics) -> dict[int, str]:
    """The steps to show, and why; the first, with all that happens once, is neither the median nor the slowest."""
    times = [
        (seconds, step)
        for step, seconds in zip(metrics.steps, metrics.values("time/step_s"), strict=False)
        if seconds is not None and step > 0
    ]
    if not times:
        return {}
    rest = sorted(times[1:])
    found = {times[0][1]: "First"}
    if rest:
        found.setdefault(rest[(len(rest) - 1) // 2][1], "Median")
        found.setdefault(rest[-1][1], "Slowest")
    return found


def read_timeline(path: Path, chosen: Mapping[int, str]) -> dict[int, list[list[Span]]]:
    """The spans of each rank in the chosen steps that the file has; a half-written last line is left out."""
    found: dict[int, list[list[Span]]] = {}
    if not path.is_file():
        return found
    for number, raw in enumerate(read_lines(path), 1):
        if not raw.endswith(b"\n"):
            break
        if (match := STEP_OF_TIMELINE.match(raw)) is None:
            raise ValueError(f"{path}, line {number}: no step of a timeline; repair the line or move the file away")
        if int(match[1]) not in chosen:
            continue
        try:
            line = Line.model_validate_json(raw)
            spans = [[Span(line.names[name], begin, end) for name, begin, end in rank] for rank in line.ranks]
        except ValidationError as error:
            raise ValueError(
                f"{path}, line {number}: {first_fault(error)}; repair the line or move the file away"
            ) from None
        except IndexError:
            raise ValueError(
                f"{path}, line {number}: a span without a name; repair the line or move the file away"
            ) from None
        found[line.step] = spans
    return found


def _introduction(num_ranks: int, is_beside: bool) -> str:
    text = (
        "What every rank did in a step, from the moment at which all had met. An empty box is a wait for others; what "
        "has no colour lies between two phases. "
    )
    if num_ranks > MOST_ROWS:
        text += f"Drawn are {MOST_ROWS} of {num_ranks} ranks, spread over all; the table counts every one. "
    if is_beside:
        text += (
            "The thin bar below a rank is a later step's rollout, generated beside training. Where training waits for "
            "its end, in a rollout of its own row, the servers are what is missing; where it ends long before the "
            "updates do, the trainer's GPUs are. "
        )
    return text + (
        "Idle is the share of all ranks' time: of a phase, what they would wait if they met at its end; of the step, "
        "what they waited."
    )


def _figure(step: Step, colors: Mapping[str, int]) -> str:
    found = idle_shares(step.ranks)
    seconds = max((span.end for spans in step.ranks for span in spans), default=0.0)
    note = f"{short(seconds)} s" + (f", idle {short(found['time/idle/step'], True)}" if found else "")
    beside, waited = (max(values) for values in zip(*(beside_and_waited(spans) for spans in step.ranks), strict=True))
    if beside:
        note += f", {BESIDE} {short(beside)} s, waited for {short(waited)} s"
    picture = timeline_chart(step.ranks, colors)
    return figure(f"{step.why} step: {step.number}", note, picture, timeline_legend(colors))


def _table(steps: Sequence[Step], phases: Sequence[str]) -> str:
    """Of each step and phase the mean over ranks, the longest with its rank, and the idle share."""
    head = "".join(f'<th colspan="3" class="n">{step.why.lower()} step: {step.number}</th>' for step in steps)
    kinds = '<th class="n">mean</th><th class="n">longest</th><th class="n">idle</th>' * len(steps)
    rows = []
    for phase in phases:
        cells = [_cells(step.ranks, phase) for step in steps]
        rows.append(f"<tr><th>{escape(phase)}</th>{''.join(cells)}</tr>")
    waits = []
    for step in steps:
        waited = [sum(s.end - s.begin for s in spans if s.name == WAITING) for spans in step.ranks]
        share = idle_shares(step.ranks).get("time/idle/step")
        waits.append(_numbers(waited) + f'<td class="n">{short(share, True)}</td>')
    rows.append(f"<tr><th>{WAITING}</th>{''.join(waits)}</tr>")
    return (
        '<div class="pair"><div class="card"><p>Seconds of each phase without the waits in it.</p>'
        '<table class="dense"><tr><th></th>'
        f"{head}</tr><tr><th>phase</th>{kinds}</tr>{''.join(rows)}</table></div></div>"
    )


def _cells(ranks: Sequence[Sequence[Span]], phase: str) -> str:
    busy = _numbers([busy_seconds(spans, phase) for spans in ranks])
    return busy + f'<td class="n">{short(phase_idle_share(ranks, phase), True)}</td>'


def _numbers(values: Sequence[float]) -> str:
    longest = max(range(len(values)), key=lambda rank: values[rank])
    rank = f" <small>rank {longest}</small>" if len(values) > 1 else ""
    return f'<td class="n">{short(sum(values) / len(values))}</td><td class="n">{short(values[longest])}{rank}</td>'

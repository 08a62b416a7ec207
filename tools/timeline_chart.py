"""Who does what when, as inline SVG in the look of charts.py: a row a rank, a bar a phase, an empty box a wait, and
below the row a thin bar for what is generated beside training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from megatron_ext.metrics.spans import BESIDE, WAITING, Span

from .charts import FONT, LEFT, NUM_COLORS, RIGHT, TOP, WIDTH, labels, short, ticks

MOST_ROWS = 32  # ranks that are drawn; of more, so many spread over them
ROWS_HEIGHT = 146  # of all rows together, as long as one is not higher than TALLEST or lower than LOWEST
TALLEST, LOWEST = 24.0, 5.0
BAR, GAP, THIN = 0.8, 0.03, 0.14  # heights of a bar, of what is below it and of a thin bar, in rows
VISIBLE = 0.25  # units of a drawn bar: what is shorter cannot be seen


def timeline_chart(ranks: Sequence[Sequence[Span]], colors: Mapping[str, int]) -> str:
    """The spans of a step, seconds to the right. ``colors`` index the page's palette by phase."""
    drawn = spread(len(ranks), MOST_ROWS)
    pitch = min(TALLEST, max(LOWEST, ROWS_HEIGHT / len(drawn)))
    bottom = TOP + pitch * len(drawn)
    end = max([1e-6, *(span.end for spans in ranks for span in spans)])
    scale = (RIGHT - LEFT) / end
    parts = [_grid(end, scale, bottom)]
    every = math.ceil((FONT + 3) / pitch)  # labels do not overlap
    for row, number in enumerate(drawn):
        y = TOP + pitch * row
        if row % every == 0:
            name = f"rank {number}" if row == 0 else str(number)
            parts.append(_text(LEFT - 6, y + pitch / 2 + 4, name, "end"))
        own = [span for span in ranks[number] if span.name != BESIDE]
        spans = sorted(own, key=lambda span: span.name == WAITING)  # waits lie on what they interrupt
        for span in joined(spans, VISIBLE / scale):
            parts.append(_bar(number, span, colors, LEFT + scale * span.begin, y, scale, BAR * pitch))
        for span in joined([span for span in ranks[number] if span.name == BESIDE], VISIBLE / scale):
            below = y + (BAR + GAP) * pitch
            parts.append(_bar(number, span, colors, LEFT + scale * span.begin, below, scale, THIN * pitch))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 38:.0f}" role="img">{"".join(parts)}</svg>'


def timeline_legend(colors: Mapping[str, int]) -> str:
    items = [
        f'<span class="item"><span class="key" style="--key:var(--c{color % NUM_COLORS})"></span>{escape(name)}</span>'
        for name, color in colors.items()
    ]
    items.append(f'<span class="item"><span class="key wait"></span>{WAITING}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def spread(count: int, most: int) -> list[int]:
    """All of ``range(count)``, or ``most`` of them, the first and the last included."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def joined(spans: Iterable[Span], gap: float) -> list[Span]:
    """Neighbours of one name that are less than ``gap`` apart as one span; what is shorter then is left out."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and last.name == span.name and 0 <= span.begin - last.end < gap:
            found[-1] = Span(span.name, last.begin, span.end)
        else:
            found.append(span)
    return [span for span in found if span.end - span.begin >= gap]


def _bar(rank: int, span: Span, colors: Mapping[str, int], x: float, y: float, scale: float, height: float) -> str:
    seconds = span.end - span.begin
    hint = f"rank {rank}: {span.name}, {short(seconds)} s from {short(span.begin)} s"
    color = colors.get(span.name)
    look = 'class="wait"' if color is None else f'class="area" fill="var(--c{color % NUM_COLORS})"'
    place = f'x="{x:.2f}" y="{y:.1f}" width="{scale * seconds:.2f}" height="{height:.1f}"'
    return f"<rect {look} {place}><title>{escape(hint)}</title></rect>"


def _grid(end: float, scale: float, bottom: float) -> str:
    marks = ticks(0.0, end)
    parts = []
    for mark, text in zip(marks, labels(marks), strict=True):
        x = LEFT + scale * mark
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>')
        parts.append(_text(x, bottom + 16, text, "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, bottom + 34, "seconds", "middle"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'

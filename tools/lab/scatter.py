"""Runs as dots over two of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..charts import BOTTOM, HEIGHT, LEFT, NUM_COLORS, RIGHT, TOP, WIDTH, figure, labels, ticks

RADIUS = 4


@dataclass(frozen=True)
class Dot:
    """``name`` is shown where the pointer rests; ``group`` is the name of its colour."""

    x: float
    y: float
    name: str
    group: str
    color: int
    spread: tuple[tuple[float, float], tuple[float, float]] | None = None  # ends of x and of y, over seeds


def scatter(title: str, note: str, dots: Sequence[Dot], *, x: str, percent: bool = False) -> str:
    """A figure of the dots, ``x`` written below its axis (in ``percent``); nothing without dots."""
    if not dots:
        return ""
    spreads = [dot.spread or ((dot.x, dot.x), (dot.y, dot.y)) for dot in dots]
    across, up = (_range([value for spread in spreads for value in spread[axis]]) for axis in (0, 1))

    def left(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - across[0]) / (across[1] - across[0])

    def top(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - up[0]) / (up[1] - up[0])

    parts = []
    marks = ticks(*up)
    for value, text in zip(marks, labels(marks), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{top(value):.1f}" y2="{top(value):.1f}"/>')
        parts.append(_text(LEFT - 6, top(value) + 4, text, "end"))
    marks = ticks(*across)
    for value, text in zip(marks, labels(marks, percent=percent), strict=True):
        parts.append(_text(left(value), BOTTOM + 16, text, "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 4, x, "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    for dot in dots:
        if dot.spread is not None:
            (x1, x2), (y1, y2) = dot.spread
            for ends in (((x1, dot.y), (x2, dot.y)), ((dot.x, y1), (dot.x, y2))):
                line = " ".join(f'x{i}="{left(x):.1f}" y{i}="{top(y):.1f}"' for i, (x, y) in enumerate(ends, 1))
                parts.append(f'<line {line} style="stroke:var(--c{dot.color % NUM_COLORS});opacity:.35"/>')
        place = f'cx="{left(dot.x):.1f}" cy="{top(dot.y):.1f}" r="{RADIUS}"'
        hint = f"<title>{escape(dot.name)}</title>"
        parts.append(f'<circle class="bubble" {place} style="--fill:var(--c{dot.color % NUM_COLORS})">{hint}</circle>')
    groups = {dot.group: dot.color % NUM_COLORS for dot in dots}
    keys = [
        f'<span class="item"><span class="key" style="--key:var(--c{color})"></span>{escape(group)}</span>'
        for group, color in groups.items()
    ]
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return figure(title, note, picture, f'<div class="legend">{"".join(keys)}</div>')


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With a little air on both sides."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return low - air, high + air


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'

"""Curves as inline SVG, written by hand: no plotting library, nothing to download, sharp at every size.

Colours and fonts come from CSS variables of the page (tools/report_style.py), so a chart follows its theme.
Missing values (None) interrupt a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 450, 10, 196  # the plot inside the picture
NUM_COLORS = 8
SMOOTH_ABOVE = 40  # points, above which the raw line fades behind its moving average

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A named curve. ``color`` indexes the page's palette, ``dashed`` marks a target, ``band`` is a low and a high."""

    name: str
    values: Values
    color: int
    dashed: bool = False
    band: tuple[Values, Values] | None = None


def line_chart(steps: Sequence[int], series: Sequence[Series], *, percent: bool = False) -> str:
    """One line per series over ``steps``."""
    curves = [curve for line in series for curve in (line.values, *(line.band or ()))]
    low, high = _range([value for curve in curves for value in curve if value is not None])
    axes = _Axes(steps[0], steps[-1], low, high)
    parts = [_frame(axes, percent)]
    parts += [_band(axes, steps, line) for line in series if line.band]
    for line in series:
        style = f'stroke="var(--c{line.color % NUM_COLORS})"' + (' stroke-dasharray="5 4"' if line.dashed else "")
        smooth = not line.dashed and line.band is None and len(steps) > SMOOTH_ABOVE
        if smooth:
            parts.append(f'<path class="raw" {style} d="{_path(axes, steps, line.values)}"/>')
        shown = moving_average(line.values) if smooth else line.values
        parts.append(f'<path class="line" {style} d="{_path(axes, steps, shown)}"/>')
        if len(steps) == 1 and line.values[0] is not None:
            point = f'cx="{axes.x(steps[0]):.1f}" cy="{axes.y(line.values[0]):.1f}"'
            parts.append(f'<circle r="3" {point} fill="var(--c{line.color % NUM_COLORS})"/>')
    return _svg(parts)


def area_chart(steps: Sequence[int], series: Sequence[Series], *, percent: bool = False) -> str:
    """Series stacked on one another, the first at the bottom; a missing value counts as 0."""
    heights = [[value or 0.0 for value in line.values] for line in series]
    total = [math.fsum(column) for column in zip(*heights, strict=True)]
    # shares sum to 1 up to rounding, which must not add a tick above 100 %
    axes = _Axes(steps[0], steps[-1], 0.0, 1.0 if percent and max(total) < 1.001 else max(max(total), 1e-12))
    parts = []
    base = [0.0] * len(steps)
    for line, height in zip(series, heights, strict=True):
        top = [low + value for low, value in zip(base, height, strict=True)]
        edge = [f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in zip(steps, top, strict=True)]
        back = [f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in zip(steps, base, strict=True)]
        parts.append(
            f'<path class="area" fill="var(--c{line.color % NUM_COLORS})" d="M{"L".join(edge + back[::-1])}Z"/>'
        )
        base = top
    return _svg([*parts, _frame(axes, percent)])


def interval_plot(rows: Sequence[tuple[float, float, float, int]]) -> str:
    """Dots with whiskers on a scale from 0 to 1: ``(mean, low, high, color)`` from top to bottom."""
    width, pitch = 220, 12
    parts = [f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{pitch * len(rows)}"/>' for x in (5, 110, 215)]
    for number, (mean, low, high, color) in enumerate(rows):
        y = pitch * number + pitch / 2
        x0, x1, x2 = (5 + 210 * value for value in (low, mean, high))
        paint = f"var(--c{color % NUM_COLORS})"
        parts.append(f'<line x1="{x0:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="{paint}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x1:.1f}" cy="{y}" r="4" fill="{paint}"/>')
    return f'<svg class="intervals" width="{width}" height="{pitch * len(rows)}">{"".join(parts)}</svg>'


def moving_average(values: Values) -> list[float | None]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    decay = 1 - 1 / max(2.0, len(values) / 20)
    total = weight = 0.0
    found: list[float | None] = []
    for value in values:
        if value is None:
            found.append(None)
            continue
        total, weight = decay * total + value, decay * weight + 1
        found.append(total / weight)
    return found


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) inside ``[low, high]``, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    pace = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= rough * 0.999)
    first = math.ceil(low / pace - 1e-9)
    return [pace * number for number in range(first, math.floor(high / pace + 1e-9) + 1)]


def short(value: float | None, percent: bool = False) -> str:
    """A figure for a label: three significant digits, thousands as k, shares as percentages."""
    if value is None:
        return "-"
    if percent:
        return f"{100 * value:.3g} %"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class _Axes:
    """From steps and values to the picture's coordinates."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: int) -> float:
        span = self.last - self.first
        return LEFT + (RIGHT - LEFT) * ((step - self.first) / span if span else 0.5)

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits with a little air; from 0 when the values are near it on that scale."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high == 0:
        return 0.0, 1.0
    if 0 <= low < high / 2:
        low = 0.0
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low == 0.0 and high > 0 else low - air), high + air


def _frame(axes: _Axes, percent: bool) -> str:
    parts = []
    for value in ticks(axes.low, axes.high):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = short(value, percent)
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{label}</text>')
    steps = ticks(axes.first, axes.last, 6) if axes.last > axes.first else [float(axes.first)]
    for value in steps:
        if value == int(value):
            x = axes.x(int(value))
            parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 8}">{int(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return "".join(parts)


def _path(axes: _Axes, steps: Sequence[int], values: Values) -> str:
    commands, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if value is None:
            pen = "M"
            continue
        commands.append(f"{pen}{axes.x(step):.1f} {axes.y(value):.1f}")
        pen = "L"
    return "".join(commands)


def _band(axes: _Axes, steps: Sequence[int], line: Series) -> str:
    """The area between a curve's low and high, which have values at the same steps."""
    assert line.band is not None
    low, high = line.band
    edge = [f"{axes.x(step):.1f} {axes.y(y):.1f}" for step, y in zip(steps, high, strict=True) if y is not None]
    back = [f"{axes.x(step):.1f} {axes.y(y):.1f}" for step, y in zip(steps, low, strict=True) if y is not None]
    return f'<path class="band" fill="var(--c{line.color % NUM_COLORS})" d="M{"L".join(edge + back[::-1])}Z"/>'


def _svg(parts: Sequence[str]) -> str:
    cursor = f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}{cursor}</svg>'


def legend(series: Sequence[Series], *, percent: bool = False) -> str:
    """Names with their colours and last values."""
    items = []
    for line in series:
        last = next((value for value in reversed(line.values) if value is not None), None)
        kind = "key dashed" if line.dashed else "key"
        items.append(
            f'<span class="item"><span class="{kind}" style="--key:var(--c{line.color % NUM_COLORS})"></span>'
            f"{escape(line.name)} <b>{short(last, percent)}</b></span>"
        )
    return f'<div class="legend">{"".join(items)}</div>'

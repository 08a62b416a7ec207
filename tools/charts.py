"""Curves as inline SVG, written by hand: no plotting library, nothing to download, sharp at every size.

Colours and fonts come from CSS variables of the page (tools/report/style.py), so a chart follows its theme. A chart is
WIDTH units wide and FONT units of text high; the page never draws one narrower than ``WIDTH * 11 / FONT`` pixels, so
that text on it stays at 11 pixels or more. Missing values (None) interrupt a line. Long curves are drawn as the means
of at most POINTS stretches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal

WIDTH, HEIGHT, FONT = 310, 196, 12
LEFT, RIGHT, TOP, BOTTOM = 46, 302, 12, 158  # the plot inside the picture
NUM_COLORS = 8
SMOOTH_ABOVE = 40  # points, above which the raw line fades behind its moving average
POINTS = 240  # a long curve's points
MOST_DIGITS = 5  # of a figure beside an axis

Values = Sequence[float | None]
Axis = Literal["step", "k"]  # k is drawn on a logarithmic scale


@dataclass(frozen=True)
class Series:
    """A named curve. ``color`` indexes the page's palette, ``dashed`` marks a target, ``band`` is a low and a high.

    ``spikes`` are steps and values to be flagged.
    """

    name: str
    values: Values
    color: int
    dashed: bool = False
    band: tuple[Values, Values] | None = None
    spikes: tuple[tuple[int, float], ...] = ()


@dataclass
class Figures:
    """The figures of a page, and the numbers that their tooltips show."""

    data: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        title: str,
        note: str,
        steps: Sequence[int],
        series: Sequence[Series],
        *,
        percent: bool = False,
        stacked: bool = False,
        x: Axis = "step",
    ) -> str:
        """One figure's HTML; nothing where no series has a value."""
        series = [line for line in series if any(value is not None for value in line.values)]
        if not series:
            return ""
        spans, drawn = thin(steps, series)
        middles = [(first + last) // 2 for first, last in spans]
        values = [[None if v is None else float(f"{v:.5g}") for v in line.values] for line in drawn]
        chart = {"steps": middles, "names": [line.name for line in series], "values": values, "percent": percent}
        if len(spans) < len(steps):
            chart["spans"] = [list(span) for span in spans]
        self.data.append(chart | {"x": x})
        if stacked:
            picture = area_chart(middles, drawn, percent=percent)
        else:
            picture = line_chart(middles, drawn, percent=percent, x=x)
        return figure(title, note, picture, legend(series, percent=percent), number=len(self.data) - 1)


def figure(title: str, note: str, picture: str, below: str, *, number: int | None = None) -> str:
    """A card with a picture; ``number`` is its place among the tooltips' data."""
    place = "" if number is None else f' data-chart="{number}"'
    picture = picture.replace("<svg ", f'<svg aria-label="{escape(title)}" ', 1)
    return f"<figure{place}><h3>{escape(title)}</h3><p>{escape(note) or '&nbsp;'}</p>{picture}{below}</figure>"


def line_chart(steps: Sequence[int], series: Sequence[Series], *, percent: bool = False, x: Axis = "step") -> str:
    """One line per series over ``steps``. Where spikes would flatten the rest, the axis leaves them out."""
    axes = _Axes(steps[0], steps[-1], *_limits(steps, series), x)
    parts = [_frame(axes, percent, steps)]
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
        parts += [_flag(axes, step, value, line.color) for step, value in line.spikes]
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
        if len(steps) == 1:  # a bar
            edge = [f"{at},{axes.y(top[0]):.1f}" for at in (LEFT, RIGHT)]
            back = [f"{at},{axes.y(base[0]):.1f}" for at in (LEFT, RIGHT)]
        parts.append(
            f'<path class="area" fill="var(--c{line.color % NUM_COLORS})" d="M{"L".join(edge + back[::-1])}Z"/>'
        )
        base = top
    return _svg([*parts, _frame(axes, percent, steps)])


def bubble_chart(points: Sequence[tuple[float, float, int]], *, x: str) -> str:
    """Circles at ``(x, y)``, shares from 0 to 1, of an area by their count, above and below the diagonal."""
    left, right, top, bottom = LEFT + 12, RIGHT - 8, TOP + 8, BOTTOM - 12  # room for circles at 0 and 1
    parts = []
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        at, y, text = left + (right - left) * mark, bottom - (bottom - top) * mark, short(mark, percent=True)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts += [_text(LEFT - 6, y + 4, text, "end"), _text(at, BOTTOM + 16, text, "middle")]
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 4, x, "middle"))
    parts.append(f'<line class="diagonal" x1="{left}" y1="{bottom}" x2="{right}" y2="{top}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    largest = max((count for _, _, count in points), default=1)
    for at, y, count in sorted(points, key=lambda point: -point[2]):
        color = "--good" if y > at else "--bad" if y < at else "--soft"
        place = f'cx="{left + (right - left) * at:.1f}" cy="{bottom - (bottom - top) * y:.1f}"'
        radius = f"{2 + 8 * math.sqrt(count / largest):.1f}"
        hint = f"{count} problem{'s' if count > 1 else ''}: {short(at, True)} → {short(y, True)}"
        parts.append(
            f'<circle class="bubble" {place} r="{radius}" style="--fill:var({color})"><title>{hint}</title></circle>'
        )
    return _svg(parts)


def interval_plot(rows: Sequence[tuple[float, float, float, int]]) -> str:
    """Dots with whiskers on a scale from 0 to 1: ``(mean, low, high, color)`` from top to bottom."""
    width, pitch = 160, 12
    left, reach = 5, width - 10
    marks = (left, left + reach / 2, left + reach)
    parts = [f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{pitch * len(rows)}"/>' for x in marks]
    for number, (mean, low, high, color) in enumerate(rows):
        y = pitch * number + pitch / 2
        x0, x1, x2 = (left + reach * value for value in (low, mean, high))
        paint = f"var(--c{color % NUM_COLORS})"
        parts.append(f'<line x1="{x0:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="{paint}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x1:.1f}" cy="{y}" r="4" fill="{paint}"/>')
    return f'<svg class="intervals" width="{width}" height="{pitch * len(rows)}">{"".join(parts)}</svg>'


def thin(steps: Sequence[int], series: Sequence[Series]) -> tuple[list[tuple[int, int]], list[Series]]:
    """At most POINTS stretches of steps, first and last included, and the series' means over them.

    The new band of a series without one reaches from its lowest to its highest value in a stretch.
    """
    size = math.ceil(len(steps) / POINTS)
    if size == 1:
        return [(step, step) for step in steps], list(series)
    cuts = [slice(first, first + size) for first in range(0, len(steps), size)]
    spans = [(steps[cut][0], steps[cut][-1]) for cut in cuts]
    found = []
    for line in series:
        low, high = line.band or (line.values, line.values)
        band = (_by(min, low, cuts), _by(max, high, cuts))
        found.append(replace(line, values=_by(statistics.fmean, line.values, cuts), band=band))
    return spans, found


def moving_average(values: Values) -> list[float | None]:
    """Exponential moving average over about a twentieth of the curve, corrected for its start."""
    decay = 1 - 1 / averaged_over(len(values))
    total = weight = 0.0
    found: list[float | None] = []
    for value in values:
        if value is None:
            found.append(None)
            continue
        total, weight = decay * total + value, decay * weight + 1
        found.append(total / weight)
    return found


def averaged_over(num_points: int) -> float:
    """How many points the moving average of a curve covers."""
    return max(2.0, num_points / 20)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) inside ``[low, high]``, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    pace = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= rough * 0.999)
    first = math.ceil(low / pace - 1e-9)
    return [pace * number for number in range(first, math.floor(high / pace + 1e-9) + 1)]


def labels(values: Sequence[float], *, percent: bool = False) -> list[str]:
    """``short`` figures of an axis, exact to its pace; where that takes too many digits, distances from the first."""
    size, pace = max(map(abs, values)), values[1] - values[0] if len(values) > 1 else 0.0
    digits = math.floor(math.log10(size)) - math.floor(math.log10(pace)) + 2 if size and pace else 3  # 2 for 2.5
    if digits <= MOST_DIGITS:
        return [short(value, percent, max(3, digits)) for value in values]
    return [short(values[0], percent), *(f"+{short(value - values[0], percent)}" for value in values[1:])]


def short(value: float | None, percent: bool = False, digits: int = 3) -> str:
    """A figure for a label: significant digits, thousands as k, shares as percentages."""
    if value is None:
        return "-"
    if percent:
        return f"{short(100 * value, digits=digits)} %"
    if value and not 1e-3 <= abs(value) < 1e13:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_plain(float(mantissa), digits)}e{int(exponent)}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size:
            return f"{_plain(value / size, digits)}{unit}"
    return _plain(value, digits)


def _plain(value: float, digits: int) -> str:
    """Without an exponent and without zeros behind the point."""
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def legend(series: Sequence[Series], *, percent: bool = False) -> str:
    """Names with their colours, last values and spikes."""
    items, flags = [], []
    for line in series:
        last = next((value for value in reversed(line.values) if value is not None), None)
        kind = "key dashed" if line.dashed else "key"
        items.append(
            f'<span class="item"><span class="{kind}" style="--key:var(--c{line.color % NUM_COLORS})"></span>'
            f"{escape(line.name)} <b>{short(last, percent)}</b></span>"
        )
        color = f"--key:var(--c{line.color % NUM_COLORS})"
        for step, value in line.spikes:
            flags.append(
                f'<span class="item spike"><span style="{color}">▲</span> spike at step {step}: '
                f"<b>{short(value, percent)}</b></span>"
            )
    return f'<div class="legend">{"".join(items + flags)}</div>'


@dataclass(frozen=True)
class _Axes:
    """From steps and values to the picture's coordinates. What lies beyond the limits is drawn on the edge."""

    first: int
    last: int
    low: float
    high: float
    kind: Axis = "step"

    def x(self, step: int) -> float:
        if self.kind == "k":
            span, at = math.log(self.last / self.first), math.log(step / self.first)
        else:
            span, at = self.last - self.first, step - self.first
        return LEFT + (RIGHT - LEFT) * (at / span if span else 0.5)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share))


def _limits(steps: Sequence[int], series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the value axis: of all there is, or of what is left without spikes three times as high."""
    curves = [curve for line in series for curve in (line.values, *(line.band or ()))]
    everything = _range([value for curve in curves for value in curve if value is not None])
    flagged = [step for line in series for step, _ in line.spikes]
    if not flagged:
        return everything
    pace = (steps[-1] - steps[0]) / max(1, len(steps) - 1)  # a drawn point stands for the steps around it
    calm = [not any(abs(step - spike) <= max(0.5, pace) for spike in flagged) for step in steps]
    rest = _range(
        [value for curve in curves for value, keep in zip(curve, calm, strict=True) if keep and value is not None]
    )
    return rest if everything[1] - everything[0] > 3 * (rest[1] - rest[0]) else everything


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits with a little air; from 0 when the values are near it on that scale."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if size < 1e-290:  # smaller ranges have no ticks in floating point
        return 0.0, 1.0
    if 0 <= low < high / 2:
        low = 0.0
    air = 0.06 * (high - low) if high - low > 1e-9 * size else 0.1 * size
    return (low if low == 0.0 and high > 0 else low - air), high + air


def _frame(axes: _Axes, percent: bool, steps: Sequence[int]) -> str:
    marks = ticks(axes.low, axes.high)
    parts = [_grid(axes, marks, labels(marks, percent=percent))]
    if axes.kind == "k":
        places = list(steps)
    elif axes.last > axes.first:
        places = [round(value) for value in ticks(axes.first, axes.last, 5) if abs(value - round(value)) < 1e-6]
    else:
        places = [axes.first]
    for step, text in zip(places, labels(places), strict=True):
        parts.append(_text(axes.x(step), BOTTOM + 16, text, "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 4, axes.kind, "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return "".join(parts)


def _grid(axes: _Axes, marks: Sequence[float], texts: Sequence[str]) -> str:
    parts = []
    for value, text in zip(marks, texts, strict=True):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, text, "end"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _flag(axes: _Axes, step: int, value: float, color: int) -> str:
    """A small triangle on the edge that the spike points to."""
    x, up = axes.x(step), value >= (axes.low + axes.high) / 2
    edge, tip = (TOP - 2, TOP - 9) if up else (BOTTOM + 2, BOTTOM + 9)
    triangle = f"M{x - 4:.1f} {edge}L{x + 4:.1f} {edge}L{x:.1f} {tip}Z"
    return f'<path class="flag" fill="var(--c{color % NUM_COLORS})" d="{triangle}"/>'


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


def _by(reduce: Any, values: Values, cuts: Sequence[slice]) -> list[float | None]:
    """``reduce`` over the values that each cut has, None where it has none."""
    parts = ([value for value in values[cut] if value is not None] for cut in cuts)
    return [reduce(part) if part else None for part in parts]


def _svg(parts: Sequence[str]) -> str:
    cursor = f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{BOTTOM}"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}{cursor}</svg>'

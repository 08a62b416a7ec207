"""How the figures of all analyses look, and where they are written.

Direct, quiet figures: a title that says what is seen, axes with units, a legend only where there is more than one
series, one palette that stays readable without colour vision (Okabe and Ito's, darkened for lines on white).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .. import charts

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#8E4B9E", "#B8860B", "#56A0D3", "#A33B3B", "#6B6B6B")
INK, SOFT, RULE = "#22242a", "#6d6f78", "#e4e2da"
GOOD, BAD = "#207d54", "#b83f2f"
WIDTH, HEIGHT, DPI = 7.2, 4.4, 160
TITLE_CHARACTERS = 8.6  # of a title, per inch of width
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
    "font.family": "DejaVu Sans",
}


@dataclass(frozen=True)
class Result:
    """What an analysis found: the numbers with their meaning, a figure, and lines for the terminal."""

    title: str
    figure: Figure
    numbers: dict[str, Any]
    meaning: str
    lines: list[str] = field(default_factory=list)


@contextmanager
def styled() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def panels(
    count: int, title: str, *, subtitle: str = "", columns: int = 3, width: float = WIDTH, height: float = HEIGHT
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes under a title; one panel is ``width`` x ``height`` inches, several are smaller."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    size = (width, height) if count == 1 else (max(width, 3.7 * columns), 3.3 * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    headed(figure, title, subtitle)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def headed(figure: Figure, title: str, subtitle: str = "") -> None:
    """A title at the left, wrapped to the figure, and a softer line below it."""
    wide = figure.get_size_inches()[0]
    lines = fill(title, int(TITLE_CHARACTERS * wide))
    figure.suptitle(lines, x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    if subtitle:
        figure.supxlabel(
            fill(subtitle, int(1.85 * TITLE_CHARACTERS * wide)), x=0.012, ha="left", fontsize=8.5, color=SOFT
        )


def color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def legend_below(axes: Axes) -> None:
    """The legend of one of a figure's axes, below all of them: names may be long."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    handles, labels = axes.get_legend_handles_labels()
    across = max(1, int(1.4 * TITLE_CHARACTERS * figure.get_size_inches()[0] / (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, loc="outside lower left", ncols=min(across, len(labels)))


def percent_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g} %"))


def powers_axis(axes: Axes, values: Sequence[int]) -> None:
    """A log2 x axis with exactly these values, thinned where they would touch."""
    axes.set_xscale("log", base=2)
    shown = list(values)[:: max(1, math.ceil(len(values) / 10))]
    axes.set_xticks(shown, [str(value) for value in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def plain_log_axis(axis: Any) -> None:
    """A log axis that says 10, 100, 1,000 and not powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def averaged_over(num_points: int) -> int:
    """Steps of a curve's moving average: about a twentieth of it."""
    return max(1, round(charts.averaged_over(num_points))) if num_points > 8 else 1


def smoothed(values: Sequence[float], times: int = 1) -> list[float]:
    """The centred moving average of a curve, over ``times`` as many steps; its ends average what there is."""
    half = times * averaged_over(len(values)) // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def count_above(axes: Axes, count: int, x: float, y: float) -> None:
    """A small number over a bar."""
    axes.annotate(f"{count:,}", (x, y), (0, 3), textcoords="offset points", ha="center", fontsize=8.5, color=SOFT)


def visible(text: str) -> str:
    """A token's text with what cannot be seen written out: a space as ␣, a new line as ↵."""
    shown = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵")
    shown = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in shown)
    return shown or "(nothing)"


def finite(value: Any) -> Any:
    """``value`` for JSON: NaN and infinity as null, numpy's numbers as Python's, floats to 6 digits."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(part) for part in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def save(result: Result, name: str, out: Path) -> tuple[Path, Path]:
    """Write ``name.png`` and ``name.json`` into the folder, and its index of all figures there."""
    out.mkdir(parents=True, exist_ok=True)
    picture, numbers = out / f"{name}.png", out / f"{name}.json"
    with styled():
        result.figure.savefig(picture, dpi=DPI)
    content = {"analysis": name, "title": result.title, "meaning": result.meaning, **finite(result.numbers)}
    numbers.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return picture, numbers


def write_index(out: Path, order: Sequence[str], missing: Sequence[tuple[str, str]] = ()) -> Path:
    """``index.html``: every figure of the folder with its title, meaning and a link to its numbers."""
    cards = []
    for name in order:
        if not ((out / f"{name}.json").is_file() and (out / f"{name}.png").is_file()):
            continue
        found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        cards.append(
            f"<section><h2>{escape(found['title'])}</h2><p>{escape(found['meaning'])}</p>"
            f'<img src="{name}.png" alt="{escape(found["title"])}"><p><a href="{name}.json">numbers</a></p></section>'
        )
    left = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in missing)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Analyses</title><style>{_PAGE}</style><main><h1>Analyses</h1>{''.join(cards)}"
        + (f"<section><h2>Left out</h2><ul>{left}</ul></section>" if left else "")
        + "</main></html>\n"
    )
    target = out / "index.html"
    target.write_text(page, encoding="utf-8")
    return target


_PAGE = """body{margin:0;background:#f6f5f1;color:#22242a;font:15px/1.5 system-ui,sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 20px 60px}h1{font-size:28px}h2{font-size:18px;margin:0 0 4px}
section{background:#fffefb;border:1px solid #e4e2da;border-radius:10px;padding:18px 20px;margin:16px 0}
section p{color:#6d6f78;margin:4px 0 12px;font-size:13.5px}img{max-width:100%;height:auto}"""

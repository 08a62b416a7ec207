"""A run's metrics as charts, section by section: what belongs together, what is zero throughout, what spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from megatron_ext.metric import Metric
from megatron_ext.metrics.glossary import VALIDATION, Glossary

from ..charts import POINTS, SMOOTH_ABOVE, Figures, Series, averaged_over
from .data import Metrics

NEIGHBOURS, SPIKE, MOST_SPIKES = 10, 8.0, 3
MOST_UNPLANNED = 60  # charts of metrics that the glossary does not have


HIDDEN = ("time/step_s", "time/save_background_s")  # the sum of the phases, and what overlaps with them
OUTCOME_COLORS = {0: 2, 2: 0}  # correct is green, the others keep their place in the palette


@dataclass(frozen=True)
class Chart:
    """The metrics that share a title in the glossary, those of a family in the run's order."""

    section: str
    title: str
    note: str
    keys: tuple[str, ...]
    percent: bool
    stacked: bool


def charts(names: Sequence[str], glossary: Glossary) -> list[Chart]:
    """What a run recorded, in the glossary's order; metrics that it does not describe come last, one a chart."""
    found: dict[tuple[str, str], list[tuple[Metric, str]]] = {}
    order = {metric.name: number for number, metric in enumerate(glossary.metrics)}
    described = [(metric, name) for name in names if name not in HIDDEN and (metric := glossary.find(name))]
    for metric, name in sorted(described, key=lambda pair: order[pair[0].name]):  # stable: a family keeps its order
        found.setdefault((metric.section, metric.title), []).append((metric, name))
    drawn = []
    for (section, title), members in found.items():
        metric = members[0][0]
        note = metric.meaning if len({each.name for each, _ in members}) == 1 else metric.unit
        keys = tuple(name for _, name in members)
        drawn.append(Chart(section, title, note, keys, metric.unit.startswith("share"), metric.adds_up))
    others = (name for name in names if name not in HIDDEN and glossary.find(name) is None)
    return drawn + [Chart("More", name, "", (name,), False, False) for name in others]


def curves(metrics: Metrics, glossary: Glossary, figures: Figures) -> str:
    """All curves by section. Charts of zeros are folded away below a section."""
    planned = charts([name for name in metrics.columns if any(np.isfinite(metrics.columns[name]))], glossary)
    more = [chart for chart in planned if chart.section == "More"][MOST_UNPLANNED:]
    planned = [chart for chart in planned if chart not in more]
    html = [f'<h2>Curves</h2><p class="sub">{escape(_averages(len(metrics.steps)))}</p>']
    for section in dict.fromkeys(chart.section for chart in planned):
        shown, zero = [], []
        for chart in planned:
            if chart.section == section:
                (shown if _nonzero(metrics, chart.keys) else zero).append(chart)
        html.append(f"<h3>{escape(section)}</h3>")
        if shown:
            html.append(f'<div class="charts">{"".join(_figure(metrics, chart, figures) for chart in shown)}</div>')
        if zero:
            titles = ", ".join(chart.title for chart in zero)
            drawn = "".join(_figure(metrics, chart, figures) for chart in zero)
            html.append(
                f'<details class="zero"><summary>Zero in every step: {escape(titles)}</summary>'
                f'<div class="charts">{drawn}</div></details>'
            )
    if more:
        html.append(f'<p class="sub">{len(more)} more metrics are in the file alone.</p>')
    return "".join(html)


def spikes(steps: Sequence[int], values: Sequence[float | None]) -> tuple[tuple[int, float], ...]:
    """Steps whose value lies SPIKE robust deviations from the median of their neighbours: the farthest MOST_SPIKES.

    The deviation is 1.4826 x the median distance of the 2 x NEIGHBOURS + 1 steps around, and at least so much that a
    spike stands out by half the range of the curve's middle nine tenths. A curve with more than
    2 % of such steps has none.
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    window = 2 * NEIGHBOURS + 1
    if len(known) < window:
        return ()
    value_N = np.array([value for _, value in known])
    around_NW = np.lib.stride_tricks.sliding_window_view(np.pad(value_N, NEIGHBOURS, mode="reflect"), window)
    middle_N = np.median(around_NW, axis=1)
    spread_N = 1.4826 * np.median(np.abs(around_NW - middle_N[:, None]), axis=1)
    low, high = np.quantile(value_N, [0.05, 0.95])
    least = max((high - low) / 2 / SPIKE, 1e-300)
    distance_N = np.abs(value_N - middle_N) / np.maximum(spread_N, least)
    found = np.flatnonzero(distance_N > SPIKE)
    if len(found) > max(MOST_SPIKES, len(known) / 50):
        return ()
    farthest = sorted(found, key=lambda place: -distance_N[place])[:MOST_SPIKES]
    return tuple(known[place] for place in sorted(farthest))


def _figure(metrics: Metrics, chart: Chart, figures: Figures) -> str:
    keys = chart.keys
    if chart.stacked:  # a share that is zero throughout cannot be seen, but its name would take room
        keys = tuple(key for key in keys if _nonzero(metrics, [key])) or keys
    short = [key.split("/", 1)[-1].removeprefix("outcome/") for key in keys]
    names = [keys[0]] if len(keys) == 1 else short if len(set(short)) == len(short) else keys
    at: Sequence[int] = range(len(metrics.steps))
    if chart.section == VALIDATION:  # not in every step: a line joins those where it was
        at = [place for place in at if not all(math.isnan(metrics.columns[key][place]) for key in keys)]
    steps, series = [metrics.steps[place] for place in at], []
    for number, (key, name) in enumerate(zip(keys, names, strict=True)):
        color = OUTCOME_COLORS.get(number, number) if key.startswith("reward/outcome/") else number
        known = metrics.values(key)
        values = [known[place] for place in at]
        flagged = () if chart.stacked else spikes(steps, values)
        is_target = key.endswith(("/anchor", "/target"))
        series.append(Series(name, values, color, dashed=is_target, spikes=flagged))
    return figures.add(chart.title, chart.note, steps, series, percent=chart.percent, stacked=chart.stacked)


def _averages(num_steps: int) -> str:
    """How the curves of a run of this length are averaged, and what is flagged."""
    text = "The figures below a chart are the last step's. "
    if num_steps > POINTS:
        size = math.ceil(num_steps / POINTS)
        text += (
            f"A point of a line is the mean of {size} steps, the pale area reaches from their lowest to their highest. "
        )
    elif num_steps > SMOOTH_ABOVE:
        text += (
            "The pale line is every step, the bold one its moving average over about "
            f"{averaged_over(num_steps):.0f} steps. "
        )
    if num_steps > 2 * NEIGHBOURS:
        text += (
            f"▲ flags steps more than {SPIKE:g} robust deviations away from the median of their neighbours, at most "
            f"{MOST_SPIKES} a curve; those that would flatten the rest are cut off."
        )
    return text


def _nonzero(metrics: Metrics, keys: Sequence[str]) -> bool:
    return any(value for key in keys for value in metrics.columns[key] if not math.isnan(value))

"""A run's metrics as charts, section by section: what belongs together, what is zero throughout, what spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from html import escape

import numpy as np

from ..charts import POINTS, SMOOTH_ABOVE, Figures, Series, averaged_over
from .data import Metrics

NEIGHBOURS, SPIKE, MOST_SPIKES = 10, 8.0, 3
MOST_UNPLANNED = 60  # charts of metrics that no chart is planned for


@dataclass(frozen=True)
class Chart:
    """A place on the page for the metrics whose names match ``keys`` (shell patterns, in drawing order)."""

    section: str
    title: str
    note: str
    keys: tuple[str, ...]
    percent: bool = False
    stacked: bool = False


CHARTS = (
    Chart("Learning", "Reward", "mean over the step's responses", ("reward/mean",)),
    Chart(
        "Learning",
        "Outcomes",
        "share of responses, by why they earned what they earned",
        ("reward/outcome/correct", "reward/outcome/*"),
        percent=True,
        stacked=True,
    ),
    Chart(
        "Learning",
        "Groups",
        "share whose responses all earn the same: nothing to learn",
        ("group/*",),
        percent=True,
    ),
    Chart("Learning", "Without advantage", "share of responses", ("advantage/zero",), percent=True),
    Chart("Learning", "Unreadable rewards", "NaN, counted as no reward", ("reward/nan",)),
    Chart("Learning", "Epochs", "and stages of the curriculum", ("data/epoch", "data/stage")),
    Chart("Entropy", "Entropy", "nats per token, whole vocabulary and nucleus", ("entropy/full", "entropy/nucleus")),
    Chart(
        "Entropy",
        "Peak entropy",
        "of the selected tokens, against its anchor",
        ("siren/hbar", "siren/*anchor", "*/anchor"),
    ),
    Chart("Entropy", "Selected tokens", "share of tokens the method acts on", ("*/selected_share",), percent=True),
    Chart("Entropy", "Nucleus size", "tokens that hold the nucleus' mass", ("entropy/nucleus_size",)),
    Chart("Update", "Loss", "as minimised", ("loss/*",)),
    Chart("Update", "Gradient norm", "before clipping", ("grad/norm", "critic/grad_norm")),
    Chart("Update", "Clipped tokens", "probability ratio beyond its bounds", ("clip/*",), percent=True),
    Chart("Update", "KL", "divergence per token", ("kl/*",)),
    Chart("Update", "Learning rate", "of the optimizer", ("optimizer/lr", "critic/lr")),
    Chart("Update", "Skipped updates", "the gradient was not finite", ("grad/skipped", "critic/skipped")),
    Chart("Critic", "Value", "mean over tokens, and the return it predicts", ("critic/value", "critic/return")),
    Chart(
        "Critic", "Explained variance", "of the returns; 0 = no better than a constant", ("critic/explained_variance",)
    ),
    Chart("Critic", "Clipped values", "moved too far in one step", ("critic/clipped",), percent=True),
    Chart("Responses", "Length", "tokens per response", ("response/length",)),
    Chart("Responses", "Cut off", "responses that reached the limit", ("response/truncated",), percent=True),
    Chart("Responses", "Log-probability", "mean over the sampled tokens", ("logprob/mean",)),
    Chart("Responses", "Mismatch", "|log-prob of the engine − of the trainer|", ("mismatch/mean", "mismatch/max")),
    Chart("Responses", "Probability ratio", "trainer to engine, mean over tokens", ("mismatch/ratio",)),
    Chart("Responses", "Unknown log-probabilities", "share of tokens", ("response/unknown_logprobs",), percent=True),
    Chart("Machine", "Time", "seconds per step, by phase", ("time/*",), stacked=True),
    Chart("Machine", "Speed", "tokens per second", ("speed/*",)),
    Chart("Machine", "Imbalance", "tokens of the busiest data-parallel rank over the mean", ("data/imbalance",)),
    Chart("Machine", "Alarms", "1 while one lasts", ("alarm/[!b]*",)),
    Chart("Machine", "Alarms begun", "since the first step", ("alarm/begun",)),
)
HIDDEN = ("time/step_s", "time/save_background_s")  # the last one overlaps with other phases
OUTCOME_COLORS = {0: 2, 2: 0}  # correct is green, the others keep their place in the palette


def curves(metrics: Metrics, figures: Figures) -> str:
    """All curves by section. Metrics nobody planned for come last; charts of zeros are folded away below a section."""
    names = [name for name in metrics.columns if name not in HIDDEN and any(np.isfinite(metrics.columns[name]))]
    placed: set[str] = set()
    planned: list[tuple[Chart, list[str]]] = []
    for chart in CHARTS:
        matching = (name for pattern in chart.keys for name in names if fnmatch(name, pattern))
        keys = [name for name in dict.fromkeys(matching) if name not in placed]
        placed.update(keys)
        if keys:
            planned.append((chart, keys))
    rest = [name for name in names if name not in placed]
    planned += [(Chart("More", name, "", (name,)), [name]) for name in rest[:MOST_UNPLANNED]]
    html = [f'<h2>Curves</h2><p class="sub">{escape(_averages(len(metrics.steps)))}</p>']
    for section in dict.fromkeys(chart.section for chart, _ in planned):
        shown, zero = [], []
        for chart, keys in planned:
            if chart.section == section:
                (shown if _nonzero(metrics, keys) else zero).append((chart, keys))
        html.append(f"<h3>{escape(section)}</h3>")
        if shown:
            html.append(
                f'<div class="charts">{"".join(_figure(metrics, chart, keys, figures) for chart, keys in shown)}</div>'
            )
        if zero:
            titles = ", ".join(chart.title for chart, _ in zero)
            drawn = "".join(_figure(metrics, chart, keys, figures) for chart, keys in zero)
            html.append(
                f'<details class="zero"><summary>Zero in every step: {escape(titles)}</summary>'
                f'<div class="charts">{drawn}</div></details>'
            )
    if len(rest) > MOST_UNPLANNED:
        html.append(f'<p class="sub">{len(rest) - MOST_UNPLANNED} more metrics are in the file alone.</p>')
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


def _figure(metrics: Metrics, chart: Chart, keys: Sequence[str], figures: Figures) -> str:
    several = [key for key in keys if _nonzero(metrics, [key])]
    if chart.stacked and several:
        keys = several  # a share that is zero throughout cannot be seen, but its name would take room
    series = []
    for number, key in enumerate(keys):
        name = key if len(keys) == 1 else key.split("/", 1)[-1].removeprefix("outcome/")
        color = OUTCOME_COLORS.get(number, number) if key.startswith("reward/outcome/") else number
        values = metrics.values(key)
        flagged = () if chart.stacked else spikes(metrics.steps, values)
        series.append(Series(name, values, color, dashed=key.endswith("anchor"), spikes=flagged))
    return figures.add(chart.title, chart.note, metrics.steps, series, percent=chart.percent, stacked=chart.stacked)


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

"""Charts are drawn to scale, labelled so that values can be told apart, and bounded however long a run is."""

from __future__ import annotations

import random
import re

import pytest

from tools.charts import (
    BOTTOM,
    POINTS,
    TOP,
    Figures,
    Series,
    area_chart,
    bubble_chart,
    labels,
    line_chart,
    moving_average,
    short,
    thin,
    ticks,
)
from tools.report.curves import spikes


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0.3, 97) == [25, 50, 75]
    assert ticks(-1e-6, 1e-6) == pytest.approx([-1e-6, -5e-7, 0, 5e-7, 1e-6])
    assert ticks(1, 140, 6) == [25, 50, 75, 100, 125]


def test_labels_are_short():
    assert [short(v) for v in (0.12345, 12.345, 1234.5, 12345, 2.5e7, None, 1e-6)] == [
        "0.123",
        "12.3",
        "1234",
        "12.3k",
        "25M",
        "-",
        "1e-6",
    ]
    assert [short(v) for v in (9_999_999.0, 1.8e-4, -2.5e-7, 3e300)] == ["10000k", "1.8e-4", "-2.5e-7", "3e300"]
    assert short(0.1234, percent=True) == "12.3 %"


def test_labels_of_an_axis_differ_and_stay_short():
    assert labels([1234567.0, 1234568.0, 1234569.0]) == ["1235k", "+1", "+2"]
    assert labels([1.0, 1.00000002]) == ["1", "+2e-8"]
    assert labels([0.1234, 0.1236], percent=True) == ["12.34 %", "12.36 %"]


def y(value: float, low: float, high: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)


def test_lines_are_drawn_to_scale_and_interrupted_where_values_miss():
    picture = line_chart([1, 2, 3, 4], [Series("a", [0.0, 1.0, None, 0.5], 0)])
    (path,) = re.findall(r'class="line"[^>]* d="([^"]*)"', picture)
    # x from 46 to 302 in thirds; y from 158 (0) to 12 (1.06)
    assert path == f"M46.0 158.0L131.3 {158 - 146 / 1.06:.1f}M302.0 {158 - 73 / 1.06:.1f}"


def test_areas_stack_to_the_total():
    picture = area_chart([1, 2], [Series("a", [0.25, 0.5], 0), Series("b", [0.75, None], 1)], percent=True)
    first, second = re.findall(r'd="([^"]*)"', picture)
    assert first == "M46.0,121.5L302.0,85.0L302.0,158.0L46.0,158.0Z"
    assert second == "M46.0,12.0L302.0,85.0L302.0,85.0L46.0,121.5Z"


def test_axes_are_named_and_k_doubles_in_equal_distances():
    assert ">step</text>" in line_chart([1, 2], [Series("a", [0.0, 1.0], 0)])
    picture = line_chart([1, 2, 4, 8], [Series("a", [0.0, 0.5, 0.75, 1.0], 0)], x="k")
    places = re.findall(r'x="([\d.]+)" y="174.0">(\d+)<', picture)
    assert places == [("46.0", "1"), ("131.3", "2"), ("216.7", "4"), ("302.0", "8")]
    assert ">k</text>" in picture


def test_bubbles_lie_above_and_below_the_diagonal_with_their_count_as_area():
    picture = bubble_chart([(0.0, 1.0, 4), (1.0, 0.0, 1), (0.5, 0.5, 1)], x="before")
    circle = r'cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)" style="--fill:var\((\S+)\)"><title>([^<]*)'
    found = re.findall(circle, picture)
    assert [(r, color, text) for _, _, r, color, text in found] == [
        ("10.0", "--good", "4 problems: 0 % → 100 %"),
        ("6.0", "--bad", "1 problem: 100 % → 0 %"),
        ("6.0", "--soft", "1 problem: 50 % → 50 %"),
    ]
    (x0, y0), (x1, y1) = ((float(x), float(y)) for x, y, *_ in found[:2])
    assert x0 < x1 and y0 < y1  # up is a small y


def test_long_curves_are_means_of_stretches_with_their_extremes():
    steps = list(range(1, 10 * POINTS + 1))
    values: list[float | None] = [float(step % 10) for step in steps]  # 1 .. 9, 0 in every stretch
    values[0:10] = [None] * 10
    spans, (line,) = thin(steps, [Series("a", values, 0)])
    assert spans[:2] == [(1, 10), (11, 20)] and len(spans) == POINTS and spans[-1][1] == steps[-1]
    assert list(line.values[:2]) == [None, 4.5]
    assert line.band is not None and (line.band[0][1], line.band[1][1]) == (0.0, 9.0)
    figures = Figures()
    html = figures.add("a", "", steps, [Series("a", values, 0)])
    assert len(figures.data[0]["values"][0]) == POINTS and figures.data[0]["spans"][1] == [11, 20]
    assert html.count("L") < 4 * POINTS
    short_run, same = thin(steps[:POINTS], [Series("a", values[:POINTS], 0)])
    assert short_run[5] == (6, 6) and same[0].band is None


def test_spikes_are_what_stands_out_from_the_steps_around():
    rng = random.Random(0)
    noise = [1 + rng.gauss(0, 0.1) for _ in range(200)]
    steps = list(range(1, 201))
    assert spikes(steps, noise) == ()
    high = [*noise[:100], 4.0, *noise[101:149], None, -9.0, *noise[151:]]
    assert spikes(steps, high) == ((101, 4.0), (151, -9.0))
    slope = [step / 100 for step in steps]
    assert spikes(steps, slope) == ()
    assert spikes(steps, [0.0] * 199 + [1.0]) == ((200, 1.0),)  # the first time in the run
    assert spikes(steps, [float(step % 10 == 0) for step in steps]) == ()  # so often that it is no spike
    assert spikes([1, 2, 3], [1.0, 1.0, 100.0]) == ()  # nothing to compare with


def test_a_spike_is_flagged_and_does_not_flatten_the_rest():
    steps = list(range(1, 61))
    values = [0.5 + 0.01 * (step % 7) for step in steps]
    values[29] = 1000.0
    calm = line_chart(steps, [Series("a", values, 0)])
    assert "1000" in calm and "flag" not in calm
    flagged = line_chart(steps, [Series("a", values, 0, spikes=spikes(steps, values))])
    marks = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', flagged)
    assert marks == ["0.5", "0.52", "0.54", "0.56"] and flagged.count('class="flag"') == 1
    heights = [float(y) for y in re.findall(r"[ML][-\d.]+ (-?[\d.]+)", flagged)]
    assert min(heights) >= TOP - 9 and max(heights) <= BOTTOM + 9  # nothing is drawn outside
    html = Figures().add("a", "", steps, [Series("a", values, 0, spikes=((30, 1000.0),))])
    assert "spike at step 30: <b>1000</b>" in html


def test_moving_average_by_hand():
    # two points: decay 1/2; (1), (.5*1 + 2) / 1.5, a gap stays a gap, (.25 + 1 + 4) / 1.75
    assert moving_average([1.0, 2.0, None, 4.0]) == pytest.approx([1, 2.5 / 1.5, None, 5.25 / 1.75])


def test_constant_and_empty_series_have_an_axis():
    picture = line_chart([1, 2], [Series("a", [0.0, 0.0], 0)], percent=True)
    assert re.findall(r">([\d. %-]+)</text>", picture)[:5] == [
        "0 %",
        "25 %",
        "50 %",
        "75 %",
        "100 %",
    ]
    rest = (
        [3.0, 3.0],
        [-1e-9, -1e-9],
        [None, None],
        [1.0, 1.0 + 2e-16],
        [5e-324, 0.0],
        [1e300, -1e300],
        [1e300, 1e300],
    )
    for values in rest:
        picture = line_chart([1, 2], [Series("a", values, 0)])
        assert not re.search("nan|inf", picture) and len(re.findall('text-anchor="end"', picture)) >= 2

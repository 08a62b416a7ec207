"""The timeline of a run: the right steps, drawn to scale, and a table of the same."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_ext.metrics.spans import BESIDE, WAITING, Span
from megatron_ext.metrics.writer import MetricsWriter
from tests.tools.report.test_page import EVIL, Page, table
from tools.charts import LEFT, RIGHT
from tools.report.data import read_metrics
from tools.report.page import report
from tools.report.timeline import choose
from tools.timeline_chart import MOST_ROWS, joined, spread, timeline_chart


def of_step(seconds: float) -> list[list[Span]]:
    """Two ranks: the first rolls out for a quarter of the step and waits for another, the second for half of it."""
    quarter, half = seconds / 4, seconds / 2
    fast = [Span("rollout", 0, quarter), Span(WAITING, quarter, half), Span("update", half, seconds)]
    return [fast, [Span("rollout", 0, half), Span("update", half, seconds)]]


def write_run(folder: Path, seconds: list[float]) -> Path:
    with MetricsWriter(folder, trackers=[], total_steps=len(seconds)) as writer:
        writer.write(0, {"validation/avg": 0.5})
        for step, took in enumerate(seconds, 1):
            writer.write_timeline(step, of_step(took))
            writer.write(step, {"time/step_s": took, "reward/mean": 0.5})
    return folder


def test_the_first_the_median_and_the_slowest_step_are_shown(tmp_path: Path) -> None:
    """Of 9 | 1, 4, 2, 8, 3 the median of the rest is 3 and the slowest 8."""
    metrics = read_metrics(write_run(tmp_path, [9, 1, 4, 2, 8, 3]))
    assert choose(metrics) == {1: "First", 6: "Median", 5: "Slowest"}
    titles = re.findall(r"<h3>(\w+ step: \d+)</h3><p>([^<]*)</p>", report(tmp_path))
    assert titles == [(f"{why} step: {n}", f"{s} s, idle 12.5 %") for why, n, s in (
        ("First", 1, 9), ("Median", 6, 3), ("Slowest", 5, 8)
    )]  # fmt: skip
    assert choose(read_metrics(write_run(tmp_path / "one", [2]))) == {1: "First"}
    assert choose(read_metrics(write_run(tmp_path / "two", [2, 1]))) == {1: "First", 2: "Median"}


def test_a_table_says_what_is_drawn(tmp_path: Path) -> None:
    """Rollouts of 1 and 2 s: a mean of 1.5, a quarter of 2 x 2 s idle; 1 of 2 x 4 s is waited."""
    assert table(report(write_run(tmp_path, [4])), "Seconds of each phase")[1:] == [
        ["phase", "mean", "longest", "idle"],
        ["rollout", "1.5", "2 rank 1", "25 %"],
        ["update", "2", "2 rank 0", "0 %"],
        ["waiting", "0.5", "1 rank 0", "12.5 %"],
    ]


def test_bars_are_to_scale_and_waits_lie_above() -> None:
    picture = ElementTree.fromstring(timeline_chart(of_step(8.0), {"rollout": 0, "update": 1}))
    bars = [(bar[0].text, bar.attrib) for bar in picture.iter("rect")]
    assert [text for text, _ in bars] == [
        "rank 0: rollout, 2 s from 0 s",
        "rank 0: update, 4 s from 4 s",
        "rank 0: waiting, 2 s from 2 s",
        "rank 1: rollout, 4 s from 0 s",
        "rank 1: update, 4 s from 4 s",
    ]
    width = RIGHT - LEFT
    assert [float(bar["width"]) for _, bar in bars] == pytest.approx(
        [width / 4, width / 2, width / 4, width / 2, width / 2]
    )
    assert [float(bar["x"]) for _, bar in bars][1:3] == [LEFT + width / 2, LEFT + width / 4]
    assert bars[2][1]["class"] == "wait" and bars[0][1]["fill"] == "var(--c0)"
    texts = [text.text for text in picture.iter("text")]
    assert texts[-3:] == ["seconds", "rank 0", "1"] and texts[:5] == ["0", "2", "4", "6", "8"]


def test_what_is_generated_beside_training_is_a_thin_bar_below_its_rank(tmp_path: Path) -> None:
    """Generation of 6 s beside updates of 5 s, and 1 s of waiting for it."""
    spans = [Span(BESIDE, 1, 7), Span("update", 1, 6), Span("rollout", 6, 7)]
    picture = ElementTree.fromstring(timeline_chart([spans, spans], {"rollout": 0, "update": 1, BESIDE: 2}))
    bars = [(bar[0].text, {name: bar.attrib[name] for name in bar.attrib}) for bar in picture.iter("rect")]
    assert [text for text, _ in bars][:3] == [
        "rank 0: update, 5 s from 1 s",
        "rank 0: rollout, 1 s from 6 s",
        f"rank 0: {BESIDE}, 6 s from 1 s",
    ]
    update, _, thin, below = (at for _, at in bars[:4])
    assert float(update["y"]) + float(update["height"]) <= float(thin["y"]) and thin["fill"] == "var(--c2)"
    assert float(thin["y"]) + float(thin["height"]) <= float(below["y"]) and thin["x"] == update["x"]
    assert float(thin["height"]) < float(update["height"]) / 4
    with MetricsWriter(tmp_path, trackers=[], total_steps=1) as writer:
        writer.write_timeline(1, [spans, spans])
        writer.write(1, {"time/step_s": 7})
    page = report(tmp_path)
    assert f"<p>7 s, idle 0 %, {BESIDE} 6 s, waited for 1 s</p>" in page and "the servers are what is missing" in page
    assert table(page, "Seconds of each phase")[2:] == [
        [BESIDE, "6", "6 rank 0", "-"],
        ["update", "5", "5 rank 0", "0 %"],
        ["rollout", "1", "1 rank 0", "-"],
        ["waiting", "0", "0 rank 0", "0 %"],
    ]
    assert "servers are" not in report(write_run(tmp_path / "in turn", [4]))


def test_many_ranks_are_a_sample_and_few_labels() -> None:
    assert spread(3, 4) == [0, 1, 2] and spread(64, 4) == [0, 21, 42, 63]
    picture = timeline_chart([[Span("update", 0, 1)]] * 512, {"update": 0})
    assert picture.count("<rect") == MOST_ROWS and "rank 511: update" in picture
    assert re.findall(r'text-anchor="end"[^>]*>([^<]*)<', picture)[:2] == ["rank 0", "49"]  # every third row


def test_what_cannot_be_seen_is_joined_or_left_out() -> None:
    spans = [Span("a", 0, 1), Span("a", 1.01, 2), Span("b", 2, 2.01), Span("a", 2.02, 3)]
    assert joined(spans, 0.05) == [("a", 0, 2), ("a", 2.02, 3)]


def test_a_run_of_one_rank_waits_for_nobody(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, trackers=[], total_steps=1) as writer:
        writer.write_timeline(1, of_step(4)[1:])
        writer.write(1, {"time/step_s": 4})
    page = report(tmp_path)
    assert table(page, "Seconds of each phase")[2] == ["rollout", "2", "2", "-"] and "idle " not in page


def test_names_of_phases_are_text(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, trackers=[], total_steps=1) as writer:
        writer.write_timeline(1, [[Span(EVIL, 0, 1)]] * 2)
        writer.write(1, {"time/step_s": 4})
    page = Page(report(tmp_path))
    assert not page.all("img") and EVIL in page.texts["th"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "line 1: no step of a timeline"),
        (b'{"step": 1, "names": [], "ranks": [[[0, 0, 1]]]}\n', "line 1: a span without a name"),
        (b'{"step": 1, "names": ["a"], "ranks": []}\n', "line 1: ranks: List should have at least 1 item"),
        (b'{"step": 1, "names": ["a"], "ranks": [[[0, 0, -1]]]}\n', "line 1: ranks.0.0.2: "),
        (b'{"step": 1, "names": ["a"], "ranks": [[[0, 0, NaN]]]}\n', "line 1: "),
        (b'{"step": 1, "names": ["a"]\n', "line 1: "),
    ],
)
def test_a_damaged_timeline_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, [1.0]) / "timeline.jsonl"
    path.write_bytes(line)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        report(tmp_path)
    path.write_bytes(line[:-1])  # killed while writing it
    assert "Timeline" not in report(tmp_path)

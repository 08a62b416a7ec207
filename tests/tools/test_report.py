"""The report is one page that loads nothing, runs one known script and escapes every text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ext.train.metrics import MetricsWriter
from tests.tools.runs import sample, save_evaluations, step_metrics, write_run
from tools import report as tool
from tools.charts import Series, area_chart, line_chart, moving_average, short, ticks
from tools.report import charts, ends, flatten, report, write_report
from tools.report_tokens import pick_samples

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<b>"


class Page(HTMLParser):
    """Elements with their attributes, and the text of the first element of some kinds."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "i", "h1", "p", "td"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_text_of_models_and_data_is_escaped(tmp_path: Path):
    config = {"name": EVIL, "method": {"name": EVIL, EVIL: EVIL}, "model": {"path": EVIL}}
    write_run(tmp_path, config=config)
    evil = sample(
        problem_id=EVIL,
        prompt=EVIL,
        answer=EVIL,
        extracted=EVIL,
        outcome=EVIL,
        tokens=[EVIL, "\n" + EVIL],
        entropy=[0.1, 2.0],
        logprob=[-0.1, -2],
    )
    with MetricsWriter(tmp_path, trackers=[], total_steps=9, resume_step=6) as writer:
        writer.write(7, step_metrics(7) | {EVIL: 1.0, f"reward/outcome/{EVIL}": 0.5}, [evil])
    save_evaluations(tmp_path, **{EVIL: [1, 2], "after": [2, 3]})
    page = Page(report(tmp_path))
    assert len(page.all("script")) == 2 and not page.all("img")
    assert not [name for tag, attributes in page.elements for name in attributes if name.startswith("on")]
    assert EVIL in page.texts["i"] and page.texts["h1"] == [EVIL]
    assert page.texts["i"][page.texts["i"].index(EVIL) + 1] == "↵\n" + EVIL
    assert page.texts["p"].count(EVIL) == 1  # the prompt
    assert json.dumps(EVIL) in page.texts["td"]  # the configuration


def test_nothing_is_loaded_and_only_the_known_script_may_run(tmp_path: Path):
    html = report(write_run(tmp_path))
    page = Page(html)
    assert not [a for _, a in page.elements if {"src", "href", "action"} & a.keys()]
    assert not re.search(r"url\(|@import|https?:", html)
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    data, script = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert page.all("script")[0]["type"] == "application/json"
    assert len(json.loads(data)["charts"]) == len(page.all("figure"))


def test_curves_cover_every_metric_once_and_tooltips_hold_their_numbers(tmp_path: Path):
    write_run(tmp_path)
    html, data = charts(tool.load_metrics(tmp_path))
    shown = [(names["names"], names["values"]) for names in data]
    by_name = {name: values for names, rows in shown for name, values in zip(names, rows, strict=True)}
    assert by_name["grad/norm"] == [0.5, None, 0.5, 0.5, 0.5, 0.5]
    assert by_name["reward/mean"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert by_name["custom/thing"] == [7.0] * 6  # not planned for, shown all the same
    assert ["correct", "wrong"] in [names for names, _ in shown]  # crashed never happened
    assert ["hbar", "anchor"] in [names for names, _ in shown]
    assert html.count("stroke-dasharray") == 1  # the anchor
    assert "time/step_s" not in by_name
    sections = re.findall(r"<h2>(\w+)</h2>", html)
    assert sections == ["Learning", "Entropy", "Update", "Machine", "More"]
    assert html.count("<div") == html.count("</div>")


def test_evaluation_shows_both_and_the_paired_difference(tmp_path: Path):
    write_run(tmp_path)
    assert "Evaluation" not in report(tmp_path)
    save_evaluations(tmp_path, before=[0, 1, 2, 1] * 5, after=[2, 2, 4, 3] * 5)
    html = report(tmp_path)
    assert "after − before, points" in html
    assert '<td>avg@4</td><td class="n">25.0% ' in html and '<td class="n">68.8% ' in html
    assert '<span class="up">+43.8</span>' in html
    save_evaluations(tmp_path, after=[1, 2])
    assert "No paired difference: the evaluations are of different problems" in report(tmp_path)


def test_tokens_are_coloured_by_entropy_and_carry_their_numbers(tmp_path: Path):
    page = Page(report(write_run(tmp_path)))
    first = page.all("i")[:4]
    # the 98th percentile of (0, .5, 1) repeated is 1: ten classes of .1 nat
    assert [a.get("class") for a in first] == ["h0", "h5", "h9", None]
    assert [a["data-t"] for a in first] == ["0 1", f"0.5 {math.exp(-1):.3g}", f"1 {math.exp(-0.5):.3g}", "- -"]
    assert page.texts["i"][:4] == ["It", " is", "↵\n", "2"] and first[2]["data-s"] == "\n"


def test_samples_are_of_steps_spread_over_the_run(tmp_path: Path):
    write_run(tmp_path, steps=20)
    found = pick_samples(tmp_path / "samples.jsonl", list(range(1, 21)))
    assert list(found) == [1, 7, 14, 20] and all(len(rows) == 2 for rows in found.values())
    assert pick_samples(tmp_path / "none.jsonl", [1]) == {}


def test_a_run_without_samples_configuration_or_a_second_step(tmp_path: Path):
    with MetricsWriter(tmp_path, trackers=[], total_steps=9) as writer:
        writer.write(3, {"reward/mean": 0.5, "entropy/full": float("inf")})
    html = report(tmp_path)
    assert f"<h1>{tmp_path.name}</h1>" in html and "<circle" in html
    assert "Responses" not in html and "Configuration" not in html


def test_secrets_of_a_foreign_configuration_are_not_shown(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "a", "hub": {"token": "hunter2"}}')
    assert "hunter2" not in report(tmp_path)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert tool.main([str(tmp_path / "none")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    write_run(tmp_path / "run")
    assert tool.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    assert write_report(tmp_path / "run", tmp_path / "x.html") == tmp_path / "x.html"


def test_ends_are_means_of_the_first_and_last_tenth():
    records = [{"step": i, "a": float(i)} for i in range(20)] + [{"step": 20, "a": None}, {"step": 21}]
    assert ends(records, "a") == (0.5, 18.5)
    assert ends(records, "b") == (None, None)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


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
        "1e-06",
    ]
    assert short(0.1234, percent=True) == "12.3 %"


def test_lines_are_drawn_to_scale_and_interrupted_where_values_miss():
    picture = line_chart([1, 2, 3, 4], [Series("a", [0.0, 1.0, None, 0.5], 0)])
    (path,) = re.findall(r'd="([^"]*)"', picture)
    # x from 46 to 450 in thirds; y from 196 (0) to 10 (1.06)
    assert path == f"M46.0 196.0L180.7 {196 - 186 / 1.06:.1f}M450.0 {196 - 93 / 1.06:.1f}"


def test_areas_stack_to_the_total():
    picture = area_chart([1, 2], [Series("a", [0.25, 0.5], 0), Series("b", [0.75, None], 1)], percent=True)
    first, second = re.findall(r'd="([^"]*)"', picture)
    assert first == "M46.0,149.5L450.0,103.0L450.0,196.0L46.0,196.0Z"
    assert second == "M46.0,10.0L450.0,103.0L450.0,103.0L46.0,149.5Z"


def test_moving_average_by_hand():
    # two points: decay 1/2; (1), (.5*1 + 2) / 1.5, a gap stays a gap, (.25 + 1 + 4) / 1.75
    assert moving_average([1.0, 2.0, None, 4.0]) == pytest.approx([1, 2.5 / 1.5, None, 5.25 / 1.75])


def test_constant_and_empty_series_have_an_axis():
    assert re.findall(r">([\d. %-]+)</text>", line_chart([1, 2], [Series("a", [0.0, 0.0], 0)], percent=True))[:5] == [
        "0 %",
        "25 %",
        "50 %",
        "75 %",
        "100 %",
    ]
    for values in ([0.0, 0.0], [3.0, 3.0], [-1e-9, -1e-9], [None, None]):
        assert "NaN" not in line_chart([1, 2], [Series("a", values, 0)])

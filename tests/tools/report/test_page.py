"""The report is one page that loads nothing, runs one known script and escapes every text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ext.metrics.writer import MetricsWriter
from tests.tools.runs import sample, save_evaluations, step_metrics, write_run
from tools.charts import Figures
from tools.report import page as tool
from tools.report.curves import curves
from tools.report.data import read_glossary, read_metrics, read_responses
from tools.report.page import ends, flatten, report, write_report
from tools.report.tokens import keep, pick

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
        if tag in ("script", "i", "h1", "p", "td", "th", "code"):
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
        writer.write(7, step_metrics(7) | {EVIL: 1.0, f"reward/outcome/{EVIL}": 0.5}, [evil] * 12)
    save_evaluations(tmp_path, text=EVIL, **{EVIL: [1, 2, 4], "after": [2, 3, 0]})
    page = Page(report(tmp_path))
    assert len(page.all("script")) == 2 and not page.all("img")
    assert not [name for tag, attributes in page.elements for name in attributes if name.startswith("on")]
    assert EVIL in page.texts["i"] and page.texts["h1"] == [EVIL]
    assert page.texts["i"][page.texts["i"].index(EVIL) + 1] == "↵\n" + EVIL
    assert page.texts["p"].count(EVIL) == 3  # the prompts of one step
    assert json.dumps(EVIL) in page.texts["td"]  # the configuration
    assert EVIL.replace(" ", "␣") in page.texts["code"] and EVIL in page.texts["th"]  # a token, a training problem
    shown = " ".join(" ".join(texts) for texts in page.texts.values())
    line = EVIL.replace("\n", " ")
    for text in (f"1+1?{line}", f"odd{line}", f"1{line}"):  # a flipped problem, its kind, its id
        assert text in page.texts["td"] + page.texts["th"], text
    assert f"voted 3{line}"[:39] in shown


def table(page: str, title: str) -> list[list[str]]:
    """The cells, as text, of the first table behind a title."""
    html = page[page.index(title) :]
    html = html[: html.index("</table>")]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in html.split("<tr>")[1:]]
    return [[unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows]


def test_flipped_problems_stand_with_what_was_voted_and_the_largest_change_first(tmp_path: Path):
    write_run(tmp_path)
    save_evaluations(tmp_path, before=[1, 4, 3, 0, 4, 2, 0], after=[3, 4, 0, 4, 2, 2, 1])
    page = report(tmp_path)
    assert "2 wrong → right" in page and "2 right → wrong" in page and "1 right and 2 wrong in both" in page
    assert table(page, "wrong → right: 2") == [
        ["problem", "prompt", "answer", "before", "after"],
        ["3", "3+1?", "4", "voted 0 0/4", "voted 4 4/4"],
        ["0", "0+1?", "1", "voted 1 1/4", "voted 3 3/4"],
    ]
    assert [row[0] for row in table(page, "right → wrong: 2")] == ["problem", "2", "4"]
    assert re.search(r'class="up">3</span> better.*class="down">2</span> worse.*<b>2</b> the same', page)
    save_evaluations(tmp_path, after=[1, 4])
    assert "Problems that flipped" not in report(tmp_path)  # other problems


def test_accuracy_is_told_by_kind_and_by_difficulty_before(tmp_path: Path):
    write_run(tmp_path)
    save_evaluations(tmp_path, before=[0, 1, 3, 4, 0, 1], after=[2, 1, 4, 4, 0, 3])
    page = report(tmp_path)
    # even: (0 + 3 + 0) / 12 -> (2 + 4 + 0) / 12; odd: (1 + 4 + 1) / 12 -> (1 + 4 + 3) / 12
    assert table(page, "Accuracy by kind")[1:] == [["even", "3", "25.0 %", "50.0 %"], ["odd", "3", "50.0 %", "66.7 %"]]
    assert table(page, "Accuracy by difficulty")[1:] == [
        ["never", "2", "0.0 %", "25.0 %"],
        ["up to 25 %", "2", "25.0 %", "50.0 %"],
        ["25 to 75 %", "1", "75.0 %", "100.0 %"],
        ["above 75 %", "1", "100.0 %", "100.0 %"],
    ]


def test_pass_at_k_is_a_curve_of_both_with_its_intervals(tmp_path: Path):
    write_run(tmp_path)
    save_evaluations(tmp_path, before=[0, 1, 2, 1] * 5, after=[2, 2, 4, 3] * 5)
    page = Page(report(tmp_path))
    chart = json.loads(page.texts["script"][0])["charts"][0]
    assert (chart["names"], chart["steps"], chart["x"]) == (["before", "after"], [1, 4], "k")
    assert chart["values"] == [[0.25, 0.75], [0.6875, 1.0]]
    assert report(tmp_path).count('class="band"') == 2


def test_entropy_is_told_by_token_string(tmp_path: Path):
    write_run(tmp_path, steps=6)
    lines = []
    for step in range(1, 7):
        nats = {"a": 1.0, "\n": 0.25, " the": 0.5 if step <= 3 else 0.1}
        row = sample(tokens=[*nats, "rare"] if step == 1 else list(nats), logprob=[-1.0] * (4 if step == 1 else 3))
        lines += [{"step": step} | row | {"entropy": [*nats.values(), 9.0][: len(row["tokens"])]}] * 2
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path)
    assert "over 38 tokens of 12 responses" in page
    total = 12 * 1.25 + 6 * 0.6 + 2 * 9
    assert table(page, "Highest mean entropy") == [
        ["token", "mean", "1st half", "2nd half", "times", "of all entropy"],
        ["a", "1", "1", "1", "12", f"{12 / total:.1%}".replace("%", " %")],
        ["␣the", "0.3", "0.5", "0.1", "12", f"{3.6 / total:.1%}".replace("%", " %")],
        ["↵", "0.25", "0.25", "0.25", "12", f"{3 / total:.1%}".replace("%", " %")],
    ]


def test_rewards_are_told_by_problem_from_their_groups(tmp_path: Path):
    write_run(tmp_path, steps=4)
    rewards = [("hard", 0.0, 0.125), ("easy", 1.0, 1.0), ("hard", 1.0, 0.375), ("old", 0.5, None)]
    lines = [
        {"step": step} | sample(problem_id=name, prompt=f"{name}?", reward=reward, group_reward=mean)
        for step, (name, reward, mean) in enumerate(rewards, 1)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert table(report(tmp_path), "Lowest reward") == [
        ["problem", "prompt", "answer", "reward", "times"],
        ["hard", "hard?", "2", "0.25 0.125 → 0.375", "2"],
        ["old", "old?", "2", "0.5", "1"],
        ["easy", "easy?", "2", "1", "1"],
    ]


def test_charts_of_zeros_are_folded_and_averages_are_said(tmp_path: Path):
    write_run(tmp_path, steps=45)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        last = {"grad/skipped": 0.0, "response/truncated": 0, "kl/old": 0, "clip/low": 0, "clip/high": 1}
        file.write(json.dumps({"step": 46} | last) + "\n")
    page = report(tmp_path)
    folded = re.findall(r'<details class="zero"><summary>([^<]*)</summary>(.*?)</details>', page)
    assert [title for title, _ in folded] == [
        "Zero in every step: Skipped updates, KL",
        "Zero in every step: Truncated",
    ]
    assert [re.findall("<h3>([^<]*)</h3>", html) for _, html in folded] == [
        ["Skipped updates", "KL"],
        ["Truncated"],
    ]
    assert "<h3>Clipped tokens</h3>" in page  # one of its curves is not zero
    assert "moving average over about 2 steps" in page and "▲ flags" in page
    assert "moving average" not in report(write_run(tmp_path / "short"))


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
    assert len(json.loads(data)["charts"]) == len([a for a in page.all("figure") if "data-chart" in a])


def test_curves_cover_every_metric_once_and_tooltips_hold_their_numbers(tmp_path: Path):
    write_run(tmp_path)
    figures = Figures()
    html = curves(read_metrics(tmp_path), read_glossary(tmp_path), figures)
    shown = [(chart["names"], chart["values"]) for chart in figures.data]
    by_name = {name: values for names, rows in shown for name, values in zip(names, rows, strict=True)}
    assert by_name["grad/norm"] == [0.5, None, 0.5, 0.5, 0.5, 0.5]
    assert by_name["reward/mean"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert by_name["custom/thing"] == [7.0] * 6  # not planned for, shown all the same
    assert ["correct", "wrong"] in [names for names, _ in shown]  # crashed never happened
    assert ["hbar", "anchor"] in [names for names, _ in shown]
    assert html.count("stroke-dasharray") == 1  # the anchor
    assert "time/step_s" not in by_name
    sections = re.findall(r"<h3>(\w+)</h3><div", html)
    assert sections == ["Learning", "Entropy", "Update", "Machine", "More"]
    assert html.count("<div") == html.count("</div>")


def test_validated_steps_are_joined_by_a_line(tmp_path: Path):
    write_run(tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for step in (3, 6):
        steps[step - 1] |= {"validation/avg": 0.1 * step, "validation/avg/a": 0.5}
    steps.insert(0, {"step": 0, "validation/avg": 0.05, "time/validation_s": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    figures = Figures()
    curves(read_metrics(tmp_path), read_glossary(tmp_path), figures)
    shown = {
        name: (chart["steps"], row)
        for chart in figures.data
        for name, row in zip(chart["names"], chart["values"], strict=True)
    }
    assert shown["validation/avg"] == ([0, 3, 6], [0.05, 0.3, 0.6])
    assert shown["validation/avg/a"] == ([3, 6], [0.5, 0.5])
    assert shown["grad/norm"][0] == [0, 1, 2, 3, 4, 5, 6]
    assert "6 steps recorded" in report(tmp_path)


def test_evaluation_shows_both_and_the_paired_difference(tmp_path: Path):
    write_run(tmp_path)
    assert "Evaluation" not in report(tmp_path)
    save_evaluations(tmp_path, before=[0, 1, 2, 1] * 5, after=[2, 2, 4, 3] * 5)
    html = report(tmp_path)
    assert "after − before, points" in html
    assert '<th>avg@4</th><td class="n">25.0 % ' in html and '<td class="n">68.8 % ' in html
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
    found = pick(keep(read_responses(tmp_path / "samples.jsonl"), [1, 20]).by_step)
    assert list(found) == [1, 7, 14, 20] and all(len(rows) == 2 for rows in found.values())
    assert pick(keep(read_responses(tmp_path / "none.jsonl"), [1]).by_step) == {}


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
    assert ends([*map(float, range(20)), None, None]) == (0.5, 18.5)
    assert ends([None]) == (None, None)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}

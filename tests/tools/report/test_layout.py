"""Pages fit 400, 800 and 1300 pixels: no sideways scrolling, text of at least 11 pixels, nothing on top of another.

What can be computed is computed from the style sheet; the rest is measured in Chromium, in one start of it. Where there
is none they skip with the reason; .ci/run installs it where it may.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from tests.tools.runs import sample, save_evaluations, step_metrics, write_run
from tools.charts import FONT, WIDTH, Figures, Series
from tools.lab.page import html_table
from tools.report.page import page, write_report
from tools.report.style import NARROWEST, PHONE, STYLE

WIDTHS = (360, 400, 800, 1300)
SMALLEST = 11  # pixels

MEASURE = """
const widths = %s, found = [];
function overlap(a, b) {
  return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
}
function measure(frame) {
  const d = frame.contentDocument, root = d.documentElement, view = frame.contentWindow;
  d.querySelectorAll("details").forEach(each => { each.open = true; });
  const texts = [...d.querySelectorAll("svg text")].map(t => ({
    size: parseFloat(view.getComputedStyle(t).fontSize) * t.getScreenCTM().a, box: t.getBoundingClientRect(),
    text: t.textContent, chart: t.closest("figure").getBoundingClientRect(), svg: t.closest("svg") }));
  const body = [...d.querySelectorAll("p,td,th,span,b,small,summary,h1,h2,h3,i,code")];
  const cards = [...d.querySelectorAll(".card")].filter(c => view.getComputedStyle(c).overflowX === "auto");
  return {
    width: view.innerWidth, page: root.scrollWidth,
    chart_text: Math.min(...texts.map(t => t.size)),
    text: Math.min(...body.map(e => parseFloat(view.getComputedStyle(e).fontSize))),
    outside: texts.filter(t => t.box.left < t.chart.left || t.box.right > t.chart.right).map(t => t.text),
    overlapping: texts.filter((t, i) => texts.some((u, j) => j < i && u.svg === t.svg && overlap(t.box, u.box)))
      .map(t => t.text),
    cards: cards.length, scrolling: cards.filter(c => c.scrollWidth > c.clientWidth + 1).length,
    wide: [...d.querySelectorAll("table")].map(t => t.scrollWidth) };
}
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) found.push(measure(frame));
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
"""


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on PATH, the layout of pages is not measured: apt-get install chromium")
    return found


def measure(html: str, folder: Path) -> list[dict[str, Any]]:
    """The page in frames of WIDTHS: what each measures."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(html)}"></iframe>' for width in WIDTHS
    )
    around = folder / "frames.html"
    around.write_text(f"<!doctype html><body>{frames}<script>{MEASURE % list(WIDTHS)}</script></body>")
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options = ["--virtual-time-budget=20000", "--dump-dom", around.as_uri()]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, f"{done.stdout[-500:]} {done.stderr[-2000:]}"
    return json.loads(unescape(match[1]))


def check(found: list[dict[str, Any]]) -> None:
    assert [each["width"] for each in found] == list(WIDTHS)
    for each in found:
        assert each["page"] <= each["width"], each
        assert each["chart_text"] >= SMALLEST and each["text"] >= SMALLEST, each
        assert not each["outside"] and not each["overlapping"], each


def long_run(folder: Path) -> Path:
    """Names, numbers and texts as long as they come."""
    write_run(folder, config={"name": "name" * 40, "method": {"name": "siren"}, "model": {"path": "m" * 90}})
    word = "w" * 300
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(99_900, 100_000):
            values = step_metrics(7) | {f"custom/{word}": 1 + step * 1e-9, "kl/old": step * 1e-9, "loss/total": -1234.5}
            values |= {"optimizer/lr": 2e-6, "grad/norm": 1e6 if step == 99_950 else 1.0 + step % 5}
            file.write(json.dumps({"step": step} | values) + "\n")
    with (folder / "samples.jsonl").open("a") as file:
        row = sample(problem_id=word, prompt=word, answer=word, tokens=[word, " x" * 200, "\n", word], outcome=word)
        file.writelines(json.dumps({"step": step} | row) + "\n" for step in range(99_900, 100_000))
    ranks = [[[0, 0.0, 1.0 + rank / 40], [1, 1.0 + rank / 40, 2.0], [2, 2.0, 1234.5]] for rank in range(40)]
    timeline = {"step": 1, "names": ["rollout", "waiting", word], "ranks": ranks}
    (folder / "timeline.jsonl").write_text(json.dumps(timeline) + "\n")
    save_evaluations(folder, text=word, before=[0, 4, 2, 1] * 5, after=[3, 2, 4, 3] * 5)
    return folder


def test_text_on_a_chart_is_never_below_11_pixels() -> None:
    figure = int(re.search(r"figure { padding:14px (\d+)px", STYLE)[1]) + 1  # type: ignore[index]  # and its border
    side = int(re.search(rf"max-width:{PHONE}px\) {{ main {{ padding:22px (\d+)px", STYLE)[1])  # type: ignore[index]
    assert f"minmax(min(100%,{NARROWEST}px),1fr)" in STYLE
    assert f".tick {{ fill:var(--soft); font-size:{FONT}px" in STYLE
    for width in WIDTHS:
        column = min(NARROWEST, width - 2 * side)  # the narrowest that the grid makes at this width or a larger one
        assert FONT * (column - 2 * figure) / WIDTH >= SMALLEST, width


def contrast(one: str, two: str) -> float:
    """Of two colours #rrggbb, as WCAG 2.2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_in_both_themes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    themes = [dict(re.findall(r"--([\w]+):(#\w{6})", part)) for part in STYLE.split("@media", 2)[:2]]
    for theme in themes:
        for text in ("ink", "soft", "good", "bad"):
            for behind in ("bg", "card"):
                assert contrast(theme[text], theme[behind]) >= 4.5, (text, behind)
        for line in range(8):
            assert contrast(theme[f"c{line}"], theme["card"]) >= 3, line


def test_a_report_fits_every_width(tmp_path: Path) -> None:
    for number, folder in enumerate((long_run(tmp_path / "long"), write_run(tmp_path / "short"))):
        found = measure(write_report(folder).read_text(), tmp_path)
        check(found)
        if number == 0:
            assert found[1]["scrolling"] > 0  # it is the cards that scroll


def test_the_lab_fits_every_width_and_its_table_1300_pixels(tmp_path: Path) -> None:
    figures = Figures()
    lines = [Series(f"a_rather_long_method_{i}", [0.1 * i] * 60, i) for i in range(8)]
    drawn = figures.add("Entropy", "nats per response token", list(range(1, 61)), lines)
    rows = [["run", "seeds", "reward, %", "entropy", "target, %", "length", "avg@16, %", "pass@16, %", "maj@16, %"]]
    rows[0] += ["time", "alarm"]
    cells = ["46.4 ± 11.9", "0.187 ± 0.006", "-18.3 ± 12.2", "128.4 ± 10.1", *["37.9 ± 10.5"] * 3, "1.00 ± 0.20"]
    rows += [["entropy_advantage_ppo", "2", *cells, "entropy_high, zero_advantage"]] * 30
    found = measure(page("The lab", html_table(rows) + f'<div class="charts">{drawn}</div>', figures.data), tmp_path)
    check(found)
    assert found[-1]["scrolling"] == 0 and found[-1]["wide"][0] < 1300

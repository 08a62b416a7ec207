"""The lab's page: claims, table, curves with bands over seeds, controllers, the exact table, settings.

``write`` leaves ``index.html`` (self-contained, as tools/report/page.py's pages) and ``README.md`` (claims and table).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from ..charts import Figures, Series
from ..report.page import page
from ..tiny.tabular import SETTINGS, Curve, simulate
from .claims import Claim, claims
from .claims_table import claims_markdown, claims_section, markdown_table
from .plan import LabPlan
from .results import Result, Results, load, seconds, spread, where_entropy_is

TABLE_POINTS = 200  # of a tabular curve's steps


def write(plan: LabPlan, out: Path) -> tuple[Path, Path]:
    """Write the page and the Markdown of the results in ``out`` (store.py); returns their paths."""
    results = load(plan, out)
    table = {name: simulate(setting) for name, setting in SETTINGS.items()} if plan.exact_table else {}
    decided = claims(results, table, plan.claims)
    figures = Figures()
    body = [
        f'<h1>{escape(plan.title)}</h1><p class="sub">{escape(summary(plan, results))}</p>',
        claims_section(decided),
        "<h2>Methods</h2>", html_table(method_rows(results)), f'<p class="sub">{escape(table_note(plan))}</p>',
        *(family_figures(plan, results, name, figures) for name in plan.families if name != plan.details.family),
        controllers(plan, results, figures),
        details(plan, results, figures),
        tabular(table, figures) if table else "",
        "<h2>Settings</h2>", settings_table(plan),
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    html, markdown = out / "index.html", out / "README.md"
    html.write_text(page(plan.title, "".join(body), figures.data), encoding="utf-8")
    markdown.write_text(as_markdown(plan, results, decided), encoding="utf-8")
    return html, markdown


def summary(plan: LabPlan, results: Results) -> str:
    """What was run, in a few lines."""
    seeds = [seed for result in results.runs.values() for seed in result.seeds]
    hours = sum(math.fsum(v or 0.0 for v in seed.curves.get("time/step_s", ())) for seed in seeds) / 3600
    # of a resumed run "; " separates those of its starts
    made = [
        {part for seed in seeds for part in (seed.made.get(key) or "").split("; ") if part}
        for key in ("commit", "machine")
    ]
    place = "".join(
        f", {word} {', '.join(sorted(found))}" for word, found in zip(("commit", "on"), made, strict=True) if found
    )
    return (
        f"{len(results.runs)} of {len(plan.runs)} runs with up to {plan.seeds} seeds ({len(seeds)} trainings of the "
        f"tiny countdown task, {hours:.1f} core hours of steps{place}). Curves are means over seeds, bands reach from "
        "the lowest to the highest seed. A model of 0.8 M parameters says nothing about large ones; it shows the "
        "mechanism."
    )


# --- table ---

UNSTEADY = 1 / 3  # of a mean: of seeds that differ by more, other things than the method decide
TABLE_NOTE = (
    "Mean ± standard deviation over seeds. Entropy, reward (the share of right answers) and length: mean over the last "
    "third of the steps. Target: distance of the late mean from the method's own target. avg, maj, pass: held-out "
    "problems after training. Time: median seconds of a step per prompt, relative to {baseline}'s of the same commit "
    "and machine; - where fewer than two seeds have one, or theirs differ by more than a third. Alarm: what "
    "lasted in most late steps of a seed."
)


def table_note(plan: LabPlan) -> str:
    return TABLE_NOTE.format(baseline=plan.baseline)


def method_rows(results: Results) -> list[list[str]]:
    """Header and one row per run."""
    every = list(results.runs.values())
    evaluated = [result.seeds[0] for result in every] + ([results.untrained] if results.untrained else [])
    metrics = table_metrics(list(evaluated[0].metrics)) if evaluated else []
    held_out = [f"{name}, %" for name in metrics]
    rows = [["run", "seeds", "reward, %", "entropy", "target, %", "length", *held_out, "time", "alarm"]]
    if results.untrained is not None:
        measured = [f"{100 * results.untrained.metrics[name]:.1f}" for name in metrics]
        rows.append(["untrained", "", "", "", "", f"{results.untrained.length:.1f}", *measured, "", ""])
    baseline = results.runs.get(results.baseline)
    for result in every:
        rows.append(
            [
                result.run.name,
                str(len(result.seeds)),
                cell(result.late("reward/outcome/correct"), ".1f", scale=100),
                cell(result.late("entropy/full"), ".3f"),
                cell(result.distance, "+.1f", scale=100),
                cell(result.late("response/length"), ".1f"),
                *(cell(result.evaluated(name), ".1f", scale=100) for name in metrics),
                pace(result, baseline),
                ", ".join(result.alarms) or "-",
            ]
        )
    return rows


def table_metrics(names: Sequence[str]) -> list[str]:
    """What the table has room for: of pass@k the largest k, the others are curves."""
    passes = [name for name in names if name.startswith("pass@")]
    return [name for name in names if name not in passes[:-1]]


def pace(result: Result, baseline: Result | None) -> str:
    """Seconds relative to the median of the baseline's that the same commit made on the same machine.

    One seed of four or more may be far from the others, by other work beside it, and does not count. "-" where the
    others are far apart, or there is one alone.
    """
    others = [] if baseline is None else list(zip(baseline.seeds, seconds(baseline), strict=True))
    own = [
        (value, [usual for other, usual in others if other.made == seed.made])
        for seed, value in zip(result.seeds, seconds(result), strict=True)
    ]
    ratios = [value / statistics.median(alike) for value, alike in own if alike]
    near = sorted(ratios, key=lambda value: abs(value - statistics.median(ratios)))
    for steady in (near, near[:-1] if len(near) > 3 else []):
        if len(steady) > 1 and max(steady) - min(steady) <= UNSTEADY * statistics.fmean(steady):
            return cell(steady, ".2f")
    return "-"


def cell(values: Sequence[float], style: str, *, scale: int = 1) -> str:
    found = spread([scale * value for value in values])
    if found is None:
        return "-"
    mean, deviation = found
    return f"{mean:{style}}" + ("" if len(values) == 1 else f" ± {deviation:{style.removeprefix('+')}}")


def cell_html(text: str) -> str:
    """The spread in small print."""
    mean, plus_minus, deviation = text.partition(" ± ")
    return escape(mean) + (f" <small>± {escape(deviation)}</small>" if plus_minus else "")


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A dense table whose first column names and whose last one may be prose."""
    head, *rest = rows
    kinds = ["", *["n"] * (len(head) - 2), "" if head[-1] == "alarm" else "n"]
    lines = [_row(head, kinds, "th", escape), *(_row(row, kinds, "td", cell_html) for row in rest)]
    return f'<div class="card dense"><table>{"".join(lines)}</table></div>'


def _row(row: Sequence[str], kinds: Sequence[str], tag: str, text: Callable[[str], str]) -> str:
    tags = ["th", *[tag] * (len(row) - 1)]
    cells = [
        f'<{each} class="{kind}">{text(value)}</{each}>' for each, kind, value in zip(tags, kinds, row, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def settings_table(plan: LabPlan) -> str:
    rows = [["run", "recipe", "overrides", "starts from", "why"]]
    for run in plan.runs:
        rows.append([run.name, str(run.recipe), " ".join(run.set) or "-", run.start or "the base model", run.note])
    lines = "".join(
        f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in row)}</tr>"
        for row, tag in zip(rows, ["th", *["td"] * len(plan.runs)], strict=True)
    )
    everywhere = f'<p class="sub">Everywhere: {escape(" ".join(plan.set))}</p>'
    return f'<div class="card"><table>{lines}</table></div>{everywhere}'


def as_markdown(plan: LabPlan, results: Results, decided: Sequence[Claim]) -> str:
    return "\n".join(
        [
            f"# {plan.title}", "", summary(plan, results), "",
            "Made by `megatron-entropy lab`; the figures are in [index.html](index.html).", "",
            *claims_markdown(decided),
            "## Methods", "", *markdown_table(method_rows(results)), "", table_note(plan), "",
        ]
    )  # fmt: skip


# --- figures ---


def family_figures(plan: LabPlan, results: Results, name: str, figures: Figures) -> str:
    """Entropy, reward, length and pass@k of a family's runs, beside the baseline."""
    members = results.family(name)
    if not members:
        return ""
    shown = members
    if plan.baseline in results and plan.baseline not in [result.run.name for result in members]:
        shown = [*members, results[plan.baseline]]
    longest = max((result.steps for result in shown), key=len)

    def color(result: Result, number: int) -> int:
        return 7 if result.run.name == plan.baseline else number % 7  # the baseline is grey everywhere

    def series(key: str) -> list[Series]:
        return [padded(result.series(key, color(result, i)), len(longest)) for i, result in enumerate(shown)]

    parts = [
        figures.add(title, note, longest, series(key), percent=percent)
        for title, note, key, percent in (
            ("Entropy", "nats per response token, whole vocabulary", "entropy/full", False),
            ("Right answers", "share of the step's responses", "reward/outcome/correct", True),
            ("Length", "tokens per response", "response/length", False),
            *((curve.title, curve.note, curve.key, curve.percent) for curve in plan.curves),
        )
    ]
    ks = list(shown[0].seeds[0].ks)
    curves = [
        Series(result.run.name, [statistics.fmean(result.evaluated(f"pass@{k}")) for k in ks], color(result, i))
        for i, result in enumerate(shown)
    ]
    if results.untrained is not None and not any(result.run.has_own_model for result in members):
        untrained = [results.untrained.metrics[f"pass@{k}"] for k in ks]
        curves.append(Series("untrained", untrained, 7, dashed=True))
    parts.append(figures.add("pass@k", "held-out problems, over k", ks, curves, percent=True, x="k"))
    return f'<h2>{escape(plan.families[name])}</h2><div class="charts">{"".join(parts)}</div>'


def controllers(plan: LabPlan, results: Results, figures: Figures) -> str:
    """Each controlled run against its target, and its output; not those that have figures in the details."""
    elsewhere = {name for _, runs in plan.details.figures for name in runs.values()}
    parts = []
    for result in results.runs.values():
        if result.targets is None or result.run.name in elsewhere or result.run.name != result.method:
            continue
        parts.append(against_target(result, figures, result.run.name, result.measured))
        output = None if result.controller is None else result.controller.output
        if output is not None:
            line = result.series(output, 1, "output")
            parts.append(figures.add(f"{result.run.name}: output", output, result.steps, [line]))
    return f'<h2>Controllers</h2><div class="charts">{"".join(parts)}</div>' if parts else ""


def against_target(result: Result, figures: Figures, title: str, key: str) -> str:
    return figures.add(title, key, result.steps, [result.series(key, 0, "measured"), target_line(result)])


def target_line(result: Result) -> Series:
    """The target at each step, which may move."""
    assert result.targets is not None and result.controller is not None
    if isinstance(result.controller.target, str):
        return result.series(result.controller.target, 7, "target", dashed=True)
    return Series("target", [result.controller.target] * len(result.steps), 7, dashed=True)


def details(plan: LabPlan, results: Results, figures: Figures) -> str:
    """One method's runs side by side, as the plan puts them, and at which tokens their entropy is."""
    parts = []
    for title, runs in plan.details.figures:
        found = {label: results[run] for label, run in runs.items() if run in results}
        parts.append(_together(title, found, figures))
    rows = [["run", "p <= .5: tokens", "entropy", "p <= .95: tokens", "entropy", "p > .95: tokens", "entropy"]]
    for name in plan.details.tokens:
        if name in results:
            shares = where_entropy_is(results[name])
            rows.append([name, *(f"{share:.0%}" for pair in shares for share in pair)])
    if not any(parts):
        return ""
    return (
        f'<h2>{escape(plan.details.title)}</h2><div class="charts">{"".join(parts)}</div>'
        "<h2>Which tokens hold the entropy</h2>"
        f'{html_table(rows)}<p class="sub">Sampled tokens of the last third by the probability they were drawn with: '
        "their share, and the share of the entropy at their positions.</p>"
    )


def _together(title: str, found: Mapping[str, Result], figures: Figures) -> str:
    if not found:
        return ""
    longest = max((result.steps for result in found.values()), key=len)
    lines = [padded(r.series("entropy/full", i, name), len(longest)) for i, (name, r) in enumerate(found.items())]
    lines.append(padded(target_line(next(iter(found.values()))), len(longest)))
    outputs = [
        padded(r.series(r.controller.output, i, name), len(longest))
        for i, (name, r) in enumerate(found.items())
        if r.controller is not None and r.controller.output is not None
    ]
    return figures.add(f"Entropy, {title}", "nats", longest, lines) + figures.add(
        f"Output, {title}", "alpha, bounded by -1 and 1", longest, outputs
    )


def tabular(table: Mapping[str, Curve], figures: Figures) -> str:
    parts = []
    for place in ("on-policy", "off-policy", "off-policy with ratio"):
        named = {
            f"{controller} from {start}": table[f"{controller}, {place}, from {start}"]
            for controller in ("P", "PI") for start in ("above", "below")
        }  # fmt: skip
        if place == "on-policy":
            named["PI, full form"] = table["PI, on-policy, full form"]
        pace = max(1, len(next(iter(named.values())).entropy) // TABLE_POINTS)
        steps = list(range(1, len(next(iter(named.values())).entropy) + 1, pace))
        target = next(iter(named.values())).setting.target
        for title, which in (("Entropy", "entropy"), ("Output", "alpha")):
            lines = [
                Series(name, getattr(curve, which)[::pace], i, band=None)
                for i, (name, curve) in enumerate(named.items())
            ]
            if which == "entropy":
                lines.append(Series("target", [target] * len(steps), 7, dashed=True))
            parts.append(figures.add(f"{title}, {place}", "exact expectation, one state, six actions", steps, lines))
    return f'<h2>EntroPIC on an exact table</h2><div class="charts">{"".join(parts)}</div>'


def padded(line: Series, length: int) -> Series:
    """A shorter run's curve, with nothing behind its end."""
    missing = [None] * (length - len(line.values))
    band = None if line.band is None else ([*line.band[0], *missing], [*line.band[1], *missing])
    return Series(line.name, [*line.values, *missing], line.color, line.dashed, band)

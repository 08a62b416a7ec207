"""The league's page: what is finished, a table and figures of each regime, moving targets, the tuning, settings.

``write`` leaves ``index.html`` (self-contained) and ``README.md`` (the tables alone), as page.py does for a plan
without regimes.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..charts import Figures
from ..report.page import page
from .claims import NOT_DECIDED
from .claims_table import markdown_table
from .following import ENTROPY, errors_of, of_seeds, tracking_error
from .league import HIGHER, LOWER, RIGHT, Row, following, is_same, league, note, table
from .page import against_target, cell, cell_html, padded, summary
from .plan import LabPlan, LabRun
from .regimes import in_regime
from .results import Curve, Result, Results, load
from .scatter import Dot, scatter
from .tuning import OBJECTIVE, Axis, nats_lost, trial_name

ONE_LINE = 32  # characters of a cell that is not broken, nor is an interval
COLUMNS = (
    "Rows are ranked by held-out avg@k alone: neighbours mostly differ by chance, see the verdicts. Mean ± standard "
    "deviation over seeds. Right (the share of right answers in training), entropy (nats a token) and length "
    "(tokens): mean over the last third of the steps. Off target: mean of |measured - target| / target over the last "
    "third, step by step; beside it what {baseline} without a controller is off the same target: a controller that "
    "is not nearer has held nothing; - where a method measures another entropy than the step's. One step's entropy "
    "has a noise of its own, 6 to 9 % of 256 responses and 13 to 19 % of 64, and an error seldom falls below it. "
    "Overshoot and settling go by means over a twelfth of the run: the largest excess beyond the target after it was "
    "first reached (- never reached, or begun within 10 % of it), and the first step from which on all are within 10 "
    "% of their target, at least the last third (- never, or no target). avg, pass: held-out problems after "
    "training; pass also less the untrained model's: who learns less keeps more of it. Tax: the sharpening tax of "
    "arXiv 2610.01509, S(K) of the untrained model less that of the trained one, S(K) = sum over k < K of (pass@K - "
    "pass@k) / ((K - 1) (1 - pass@1)), K all responses to a problem; above 0 further tries have become worth less. "
    "It grows with avg@k by itself, and is - below an avg@k of 1 %. Time: median seconds of a step per prompt, "
    "relative to {baseline}'s of the same commit and machine; - where fewer than two seeds have one, or theirs "
    "differ by more than a third."
)


def write(plan: LabPlan, out: Path) -> tuple[Path, Path]:
    """Write the page and the Markdown of the results in ``out`` (store.py); returns their paths."""
    results = load(plan, out)
    found = league(plan, results)
    figures, body = Figures(), [f'<h1>{escape(plan.title)}</h1><p class="sub">{escape(summary(plan, results))}</p>']
    lines = [
        f"# {plan.title}", "", summary(plan, results), "",
        "Made by `megatron-entropy lab`; the figures are in [index.html](index.html).", "",
    ]  # fmt: skip
    for part in sections(plan, results, found, figures):
        body.append(f"<h2>{escape(part.title)}</h2>")
        body += [f'<p class="sub">{escape(text)}</p>' for text in part.texts]
        body += [html_table(part.rows) if part.rows else "", f'<div class="charts">{part.figures}</div>']
        lines += [f"## {part.title}", "", *(line for text in part.texts for line in (text, ""))]
        lines += [*markdown_table(part.rows), ""] if part.rows else []
    out.mkdir(parents=True, exist_ok=True)
    html, markdown = out / "index.html", out / "README.md"
    html.write_text(page(plan.title, "".join(body), figures.data), encoding="utf-8")
    markdown.write_text("\n".join(lines), encoding="utf-8")
    return html, markdown


@dataclass(frozen=True)
class Section:
    """A part of the page: paragraphs, a table with its header (or none) and figures, which Markdown leaves out."""

    title: str
    texts: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: str = ""


def sections(plan: LabPlan, results: Results, found: dict[str, list[Row]], figures: Figures) -> list[Section]:
    parts = [
        Section("What is finished", (plan.waiting,) if plan.waiting else (), finished(plan, results)),
        Section("How to read the tables", (note(plan, found), COLUMNS.format(baseline=plan.baseline))),
    ]
    for regime in plan.regimes:
        rows = found[regime.name]
        if not rows:
            parts.append(Section(regime.title, ("No run of it is finished.",)))
            continue
        drawn = regime_figures(plan, results, regime.name, rows, figures)
        parts.append(Section(regime.title, (), table(plan, results, regime.name, rows), drawn))
    parts += own_sections(plan, results, figures)
    if plan.tuning is not None:
        parts.append(Section("Tuning", (tuning_text(plan),), tuning_table(plan, results)))
    everywhere = f"Everywhere: {' '.join(plan.set)}"
    return [*parts, Section("Regimes", (), regime_table(plan)), Section("Settings", (everywhere,), settings(plan))]


# --- what is there, and what is not ---


def finished(plan: LabPlan, results: Results) -> list[list[str]]:
    """For each group of runs, in the order of the jobs: finished trainings, and what is missing."""
    rows = [["runs", "trainings", "missing"]]
    for group in dict.fromkeys(run.group for run in sorted(plan.runs, key=lambda run: run.stage)):
        runs = [run for run in plan.runs if run.group == group]
        planned = {run.name: len(plan.seeds_of(run)) for run in runs}
        done = {run.name: len(results[run.name].seeds) if run.name in results else 0 for run in runs}
        missing = [
            run.name.partition("@")[0] + (f" ({done[run.name]} of {planned[run.name]})" if done[run.name] else "")
            for run in runs
            if done[run.name] < planned[run.name]
        ]
        said = "everything" if len(missing) == len(runs) and not any(done.values()) else ", ".join(missing) or "-"
        rows.append([group, f"{sum(done.values())} of {sum(planned.values())}", said])
    return rows


# --- figures of a regime ---


def regime_figures(plan: LabPlan, results: Results, regime: str, rows: Sequence[Row], figures: Figures) -> str:
    """Right answers over entropy, then the entropy of every family beside the baseline's, by setting."""
    color = {family: number for number, family in enumerate(plan.families)}
    dots = [
        Dot(
            statistics.fmean(row.result.late(RIGHT)),
            statistics.fmean(row.result.late(ENTROPY)),
            f"{row.result.run.base}, {row.setting}: {100 * statistics.fmean(row.result.late(RIGHT)):.1f} %, "
            f"{statistics.fmean(row.result.late(ENTROPY)):.3f} nats",
            plan.families[row.result.run.family],
            color[row.result.run.family],
            spread=(_ends(row.result.late(RIGHT)), _ends(row.result.late(ENTROPY))),
        )
        for row in rows
        if row.result.late(RIGHT) and row.result.late(ENTROPY) and not row.repeats
    ]
    parts = [
        scatter("Entropy over right answers", "nats; late means, lowest to highest seed", dots, x="right", percent=True)
    ]
    for family, title in plan.families.items():
        for setting, words in (("", ""), ("tuned", ", tuned")):
            members = [
                row.result
                for row in rows
                if (row.result.run.family, row.result.run.setting) == (family, setting) and not row.repeats
            ]
            parts.append(entropy_figure(plan, results, regime, f"{title}{words}", members, figures))
    return "".join(parts)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def entropy_figure(
    plan: LabPlan, results: Results, regime: str, title: str, members: Sequence[Result], figures: Figures
) -> str:
    baseline = results.runs.get(plan.baseline_in(regime))
    if not members:
        return ""
    others = [result for result in members if result is not baseline]
    of_family = list(dict.fromkeys(run.base for run in plan.runs if run.family == members[0].run.family))
    shown = [*others, *([baseline] if baseline is not None else [])]
    longest = max((result.steps for result in shown), key=len)
    lines = [
        padded(
            result.series(ENTROPY, 7 if result is baseline else of_family.index(result.run.base) % 7, result.run.base),
            len(longest),
        )
        for result in shown
    ]
    return figures.add(title, "entropy, nats per response token", longest, lines)


# --- runs that only some regimes have: targets that move ---


def own_sections(plan: LabPlan, results: Results, figures: Figures) -> list[Section]:
    """For each family of such runs how they follow their targets, with a figure of each."""
    of_own = [run for run in plan.runs if run.regimes is not None and not run.setting]
    parts = []
    for family in dict.fromkeys(run.family for run in of_own):
        runs = [run for run in of_own if run.family == family]
        late = ("late, %", f"{plan.baseline} late, %", "overshoot, %", "settles at step")
        rows = [["run", "regime", "seeds", "off target at any step, %", *late]]
        drawn = []
        for run in runs:
            if run.name not in results:
                rows.append([run.base, run.regime, "0", "-", *["-"] * len(late)])
                continue
            result = results[run.name]
            errors = [value for value in of_seeds(mean_error, result) if value is not None]
            followed = following(result, results.runs.get(plan.baseline_in(run.regime)))
            rows.append([run.base, run.regime, str(len(result.seeds)), cell(errors, ".1f", scale=100), *followed])
            if result.targets is not None:
                off = f"{cell(errors, '.1f', scale=100)} % off at any step" if errors else ""
                drawn.append(against_target(result, figures, run.base, f"{result.measured}, nats; {off}"))
        text = "Each beside its target; off target is the mean of |measured - target| / target, step by step."
        parts.append(Section(plan.families[family], (text,), rows, "".join(drawn)))
    return parts


def mean_error(measured: Curve, target: Curve) -> float | None:
    """Mean of |measured - target| / target over all steps."""
    errors = [abs(error) for _, error in errors_of(measured, target)]
    return statistics.fmean(errors) if errors else None


# --- tuning and settings ---


def tuning_text(plan: LabPlan) -> str:
    tuning = plan.tuning
    assert tuning is not None
    return (
        f"Every method has {tuning.budget} trials of one axis beside its paper's values, with one seed "
        f"(train.seed {tuning.first_seed}) that no other run has, {tuning.regime}. Chosen by {OBJECTIVE}. No held-out "
        "answer decides, so that those of the tables above stay held out, and nothing is chosen for how well it "
        "follows a target. A trial's score: right answers, nats lost, and of a method with a target how far off it is. "
        "= marks a trial that is an earlier one's to the bit. One seed is little: another could choose another trial."
    )


def tuning_table(plan: LabPlan, results: Results) -> list[list[str]]:
    tuning = plan.tuning
    assert tuning is not None
    rows = [["method", "axis", "paper's", *(f"trial {i + 1}" for i in range(tuning.budget)), "chosen"]]
    for axis in tuning.axes:
        choice = tuning.chosen.get(axis.run)
        chosen = "not yet" if choice is None else " ".join(axis.overrides(choice.trial)) or "paper's"
        trials = [trial_text(tuning.regime, axis, number, results) for number in range(tuning.budget + 1)]
        rows.append([axis.run, axis.title, *trials, chosen])
    return rows


def trial_text(regime: str, axis: Axis, number: int, results: Results) -> str:
    overrides = " ".join(axis.overrides(number)).replace("method.", "")
    result = results.runs.get(in_regime(trial_name(axis.run, number), regime))
    score = "-" if result is None else f"{100 * statistics.fmean(result.late(RIGHT)):.1f} %, {nats_lost(result):.3f}"
    if result is not None:
        errors = [error for error in of_seeds(tracking_error, result) if error is not None]
        score += f", off {100 * errors[0]:.0f} %" if errors else ""
        earlier = [results.runs.get(in_regime(trial_name(axis.run, before), regime)) for before in range(number)]
        score += " =" if any(other is not None and is_same(other, result) for other in earlier) else ""
    return f"{overrides}: {score}" if overrides else score


def regime_table(plan: LabPlan) -> list[list[str]]:
    rows = [["regime", "what", "overrides", "of single runs", "runs"]]
    for regime in plan.regimes:
        of = "; ".join(f"{run}: {' '.join(own)}" for run, own in regime.of.items())
        which = "all" if regime.runs is None else ", ".join(regime.runs)
        rows.append([regime.name, regime.title, " ".join(regime.set) or "-", of or "-", which])
    return rows


def settings(plan: LabPlan) -> list[list[str]]:
    """A line for each entry of the plan, as its first regime has it, without what the regime adds."""
    rows = [["run", "recipe", "overrides", "seeds from", "why"]]
    regimes, entries = {regime.name: regime for regime in plan.regimes}, dict[str, LabRun]()
    for run in plan.runs:
        if not run.setting:
            entries.setdefault(run.base, run)
    for run in entries.values():
        regime = regimes[run.regime]
        own = run.set[: len(run.set) - len(regime.set) - len(regime.of.get(run.base, ()))]
        last = {override.partition("=")[0]: override for override in own}  # of a key given twice the last one counts
        rows.append([run.base, str(run.recipe), " ".join(last.values()) or "-", str(run.first_seed), run.note or "-"])
    return rows


# --- HTML ---


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A dense table; a column whose cells are all numbers stands to the right, verdicts are coloured."""
    head, *rest = rows
    number = [all(re.match(r"[-+\d.]", row[i]) for row in rest) and i > 0 for i in range(len(head))]
    lines = [_line(head, number, "th")]
    lines += [_line(row, number, "td") for row in rest]
    return f'<div class="card dense"><table>{"".join(lines)}</table></div>'


def _line(row: Sequence[str], number: Sequence[bool], tag: str) -> str:
    cells = []
    for i, text in enumerate(row):
        own = "th" if i == 0 and len(row) > 1 else tag
        kind = "up" if text.startswith(HIGHER) else "down" if text.startswith(LOWER) else "n" if number[i] else ""
        kind += " line" if text.startswith((HIGHER, LOWER, NOT_DECIDED)) or len(text) <= ONE_LINE else ""
        cells.append(f'<{own} class="{kind}">{cell_html(text)}</{own}>')
    return f"<tr>{''.join(cells)}</tr>"

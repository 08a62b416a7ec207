"""Held-out problems in the report: metrics of every label, and what changed from the first to the last.

With two labels of the same problems: paired differences, right of n by problem, accuracy by the problems' difficulty
before, and the problems whose majority answer flipped.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from megatron_ext.metrics.eval_stats import Difference, differences

from ..charts import NUM_COLORS, Figures, Series, bubble_chart, figure, interval_plot
from .data import Evaluation, Interval, Problem

LISTED = 12  # flipped problems of each direction
LONG, SHORT = 160, 40  # characters of a prompt and of an answer in a table
DIFFICULTIES = ((0.0, "never"), (0.25, "up to 25 %"), (0.75, "25 to 75 %"), (1.0, "above 75 %"))


def evaluations(found: Mapping[str, Evaluation], figures: Figures) -> str:
    """The section; nothing without an evaluation. The first label is compared with the last."""
    if not found:
        return ""
    (first, before), (last, after) = list(found.items())[0], list(found.items())[-1]
    pairs: dict[str, Difference] = {}
    why = ""
    if len(found) > 1:
        try:
            pairs = differences(before.model_dump(), after.model_dump())
        except ValueError as error:
            why = f" No paired difference: {error}."
    decoding = after.decoding
    about = (
        f"{len(after.problems)} problems of {Path(after.data.path).name}, {decoding.samples} responses each, "
        f"temperature {decoding.temperature:g}, top-p {decoding.top_p:g}, "
        f"at most {decoding.max_response_tokens} tokens. 95 % intervals by bootstrap over problems.{why}"
    )
    parts = [
        f'<h2>Evaluation</h2><p class="sub">{escape(about)}</p>',
        _metrics(found, pairs, f"{last} − {first}"),
        '<div class="charts">',
        _pass_at_k(found, figures),
        _by_problem(before, after, first, last) if pairs else "",
        "</div>",
    ]
    tables = _by_kind(found)
    both = list(zip(before.problems, after.problems, strict=True)) if pairs else []
    if pairs:
        tables += _by_difficulty(both, first, last)
    parts.append(f'<div class="pair">{tables}</div>')
    return "".join(parts) + (_flips(both, first, last) if pairs else "")


def _metrics(found: Mapping[str, Evaluation], pairs: Mapping[str, Difference], title: str) -> str:
    """Metrics of every label side by side, and the paired difference of the last to the first."""
    head = "".join(
        f'<th class="n"><span class="key" style="--key:var(--c{number % NUM_COLORS})"></span>{escape(label)}</th>'
        for number, label in enumerate(found)
    )
    if pairs:
        head += f'<th class="n">{escape(title)}, points</th>'
    rows = []
    for name in dict.fromkeys(name for item in found.values() for name in item.metrics):
        cells, dots = [], []
        for number, item in enumerate(found.values()):
            value = item.metrics.get(name)
            cells.append(f'<td class="n">{_interval(value)}</td>')
            if value is not None:
                dots.append((value.mean, value.low, value.high, number))
        if pairs:
            cells.append(f'<td class="n">{_difference(pairs[name]) if name in pairs else "-"}</td>')
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}<td>{interval_plot(dots)}</td></tr>")
    return f'<div class="card"><table><tr><th></th>{head}<th>0 … 100 %</th></tr>{"".join(rows)}</table></div>'


def _pass_at_k(found: Mapping[str, Evaluation], figures: Figures) -> str:
    ks = sorted({k for item in found.values() for k in item.decoding.ks})
    series = []
    for number, (label, item) in enumerate(found.items()):
        values = [item.metrics.get(f"pass@{k}") for k in ks]
        low, high = ([value and getattr(value, end) for value in values] for end in ("low", "high"))
        series.append(Series(label, [value and value.mean for value in values], number, band=(low, high)))
    return figures.add("pass@k", "at least one of k right; with 95 % intervals", ks, series, percent=True, x="k")


def _by_problem(before: Evaluation, after: Evaluation, first: str, last: str) -> str:
    """Every problem's share of right responses, before and after."""
    shares = [(a.c / a.n, b.c / b.n) for a, b in zip(before.problems, after.problems, strict=True)]
    points = [(x, y, count) for (x, y), count in Counter(shares).items()]
    better, worse = sum(y > x for x, y in shares), sum(y < x for x, y in shares)
    note = f"share of right responses, {last} (up) against {first} (across)"
    below = (
        f'<div class="legend"><span class="item"><span class="up">{better}</span> better</span>'
        f'<span class="item"><span class="down">{worse}</span> worse</span>'
        f'<span class="item"><b>{len(shares) - better - worse}</b> the same</span></div>'
    )
    return figure("By problem", note, bubble_chart(points, x=first), below)


def _by_kind(found: Mapping[str, Evaluation]) -> str:
    """Mean share of right responses by the problems' kind, where there are kinds."""
    kinds = sorted({row.kind for item in found.values() for row in item.problems if row.kind})
    if not kinds:
        return ""
    rows = []
    for kind in kinds:
        each = [[row for row in item.problems if row.kind == kind] for item in found.values()]
        cells = "".join(_mean_cell(rows_of_label) for rows_of_label in each)
        rows.append(f'<tr><th>{escape(kind)}</th><td class="n">{max(map(len, each))}</td>{cells}</tr>')
    head = "".join(f'<th class="n">{escape(label)}</th>' for label in found)
    return (
        '<div class="card"><h3>Accuracy by kind</h3><table><tr><th>kind</th><th class="n">problems</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def _by_difficulty(both: Sequence[tuple[Problem, Problem]], first: str, last: str) -> str:
    rows, low = [], -1.0
    for high, name in DIFFICULTIES:
        each = [pair for pair in both if low < pair[0].c / pair[0].n <= high]
        low = high
        cells = _mean_cell([a for a, _ in each]) + _mean_cell([b for _, b in each])
        rows.append(f'<tr><th>{name}</th><td class="n">{len(each)}</td>{cells}</tr>')
    head = f'<th class="n">{escape(first)}</th><th class="n">{escape(last)}</th>'
    return (
        f'<div class="card"><h3>Accuracy by difficulty</h3><table><tr><th>right {escape(first)}</th>'
        f'<th class="n">problems</th>{head}</tr>{"".join(rows)}</table>'
        f"<p>Difficulty is the share of right responses {escape(first)}, bad luck included: some of the gain in the "
        "upper rows and of the loss in the lower would be seen without training.</p></div>"
    )


def _flips(both: Sequence[tuple[Problem, Problem]], first: str, last: str) -> str:
    """The problems whose majority answer changed sides, the largest changes first."""
    sides = Counter((a.majority, b.majority) for a, b in both)
    parts = [
        "<h3>Problems that flipped</h3>"
        f'<p class="sub">By their majority answer, {escape(first)} → {escape(last)}: '
        f'<span class="up">{sides[False, True]} wrong → right</span>, '
        f'<span class="down">{sides[True, False]} right → wrong</span>, '
        f"{sides[True, True]} right and {sides[False, False]} wrong in both.</p>"
    ]
    for now_right, name in ((True, "wrong → right"), (False, "right → wrong")):
        flipped = [(a, b) for a, b in both if (a.majority, b.majority) == (not now_right, now_right)]
        flipped.sort(key=lambda pair: (pair[0].c / pair[0].n - pair[1].c / pair[1].n) * (1 if now_right else -1))
        if not flipped:
            continue
        texts = any(b.prompt for _, b in flipped)
        rows = "".join(
            f"<tr><th>{escape(clipped(a.id))}</th>{_texts(b) if texts else ''}{_vote(a)}{_vote(b)}</tr>"
            for a, b in flipped[:LISTED]
        )
        head = "<th>prompt</th><th>answer</th>" if texts else ""
        head = f"<tr><th>problem</th>{head}<th>{escape(first)}</th><th>{escape(last)}</th></tr>"
        count = f"{len(flipped)}" if len(flipped) <= LISTED else f"{LISTED} of {len(flipped)}"
        parts.append(
            f"<details{' open' if now_right else ''}><summary>{name}: {count}</summary>"
            f'<div class="card"><table>{head}{rows}</table></div></details>'
        )
    return "".join(parts)


def _texts(row: Problem) -> str:
    return f'<td class="text">{escape(clipped(row.prompt))}</td><td>{escape(clipped(row.answer, SHORT))}</td>'


def _vote(row: Problem) -> str:
    """A majority answer and how many responses were right."""
    answer = "no answer" if row.majority_answer is None else clipped(row.majority_answer, SHORT)
    kind = "up" if row.majority else "down"
    return f'<td class="vote"><span class="{kind}">{escape(answer)}</span> <small>{row.c}/{row.n}</small></td>'


def _mean_cell(rows: Sequence[Problem]) -> str:
    mean = f"{statistics.fmean(row.c / row.n for row in rows):.1%}" if rows else "-"
    return f'<td class="n">{mean.replace("%", " %")}</td>'


def clipped(text: str, length: int = LONG) -> str:
    """On one line, at most ``length`` characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _interval(value: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value.mean:.1f} % <small>{100 * value.low:.1f} … {100 * value.high:.1f}</small>"


def _difference(found: Difference) -> str:
    interval = found.interval
    kind = "" if not found.significant else "up" if interval.mean > 0 else "down"
    return (
        f'<span class="{kind}">{100 * interval.mean:+.1f}</span> '
        f"<small>{100 * interval.low:+.1f} … {100 * interval.high:+.1f}</small>"
    )

"""The claims on the lab's page and in its Markdown: verdict, interval, seeds, controls, and what the papers report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .claims import NOT_DECIDED, NOT_RUN, NULL, OPPOSITE, SHOWS, Claim

HEAD = ("paper", "claim", "rule", "here it", "effect, 95 % interval", "seeds", "measured", "the paper's own")


def note(decided: Sequence[Claim]) -> str:
    """How to read the verdicts, and how many would show by chance."""
    tested = [claim for claim in decided if claim.p is not None and claim.paper != NULL]
    shows = [claim for claim in tested if claim.verdict == SHOWS]
    opposite = [claim for claim in tested if claim.verdict == OPPOSITE]
    held = sum(claim.within for claim in tested)
    apart = f", apart from {held} that say that something stays within a margin" if held else ""
    return (
        "A claim shows when the whole 95 % interval of its effect, over seeds (and over problems, for held-out "
        "answers), lies beyond the margin on the claimed side; it shows the opposite when it lies beyond the margin on "
        "the other side; otherwise it is not decided, which is not evidence of no effect. "
        f"{len(tested)} claims have an interval: {len(shows)} show, {len(opposite)} show the opposite. Each interval "
        "stands for itself: were there no effect at all, chance alone would make "
        f"{0.025 * (len(tested) - held):.1f} of them show and as many the opposite, at most{apart}. "
        "A star marks verdicts that hold for all claims together (Holm's correction)."
    )


def null_note(control: Sequence[Claim]) -> str:
    wrong = [claim for claim in control if claim.verdict in (SHOWS, OPPOSITE)]
    run = [claim for claim in control if claim.verdict != NOT_RUN]
    found = f"{len(run) - len(wrong)} of {len(run)} comparisons are not decided, as they should be"
    return (
        "Two runs of one method with different seeds, asked by every rule that compares two runs, but for distances "
        f"from a target, which they do not have: {found}."
    )


def rows(decided: Sequence[Claim]) -> list[list[str]]:
    return [
        [
            claim.paper,
            claim.text,
            claim.rule,
            claim.verdict + (" *" if claim.survives and claim.verdict not in (NOT_DECIDED, NOT_RUN) else ""),
            claim.effect or "-",
            str(claim.num_seeds or "-"),
            claim.measured,
            claim.published or "-",
        ]
        for claim in decided
    ]


def claims_section(decided: Sequence[Claim]) -> str:
    claims, control = parted(decided)
    return (
        f'<h2>Claims</h2><p class="sub">{escape(note(decided))}</p>{_table(claims)}'
        f'<h2>Null control</h2><p class="sub">{escape(null_note(control))}</p>{_table(control)}'
    )


def claims_markdown(decided: Sequence[Claim]) -> list[str]:
    claims, control = parted(decided)
    return [
        *("## Claims", "", note(decided), "", *markdown_table([HEAD, *rows(claims)]), ""),
        *("## Null control", "", null_note(control), "", *markdown_table([HEAD, *rows(control)]), ""),
    ]


def parted(decided: Sequence[Claim]) -> tuple[list[Claim], list[Claim]]:
    """The papers' claims, and the null control."""
    return [c for c in decided if c.paper != NULL], [c for c in decided if c.paper == NULL]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _table(decided: Sequence[Claim]) -> str:
    lines = []
    for claim, row in zip(decided, rows(decided), strict=True):
        paper, text, rule, verdict, effect, seeds, measured, published = map(escape, row)
        kind = {SHOWS: "up", OPPOSITE: "down"}.get(claim.verdict, "")
        own = "" if published == "-" else f"<br><small>the paper: {published}</small>"
        lines.append(
            f"<tr><td>{paper}</td><td>{text}<br><small>{rule}</small></td>"
            f'<td class="{kind}">{verdict}</td><td>{effect}<br><small>{seeds} seeds</small></td>'
            f"<td>{measured}{own}</td></tr>"
        )
    head = "<tr><th>paper</th><th>claim and rule</th><th>here it</th><th>effect, 95 %</th><th>measured</th></tr>"
    return f'<div class="card"><table>{head}{"".join(lines)}</table></div>'

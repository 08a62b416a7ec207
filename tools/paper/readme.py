"""``recipes/papers/<paper>/README.md``, written from tables.toml: every table and figure with its commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from .rows import PROGRAM, row_config, train_command
from .tables import Paper, PaperTable, Row
from .tiny import chain

RULE = "|---|---|---|---|"


def readme(paper: Paper) -> str:
    """The page as text."""
    return "\n".join(_lines(paper)) + "\n"


def _lines(paper: Paper) -> Iterator[str]:
    yield f"# {paper.title}"
    yield ""
    yield f"arXiv [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}). Written from `tables.toml` by"
    yield "`python -m tools.paper --write`."
    yield ""
    yield "```bash"
    yield f"{PROGRAM} paper {paper.name}                 # what is there, the next command of each row"
    yield f"{PROGRAM} paper {paper.name} --differences   # in what the methods differ, with the paper's place"
    yield f"{PROGRAM} paper {paper.name} --tiny          # the same chain on the tiny task, below"
    yield "```"
    yield ""
    yield "None of the full-size runs has been made here. Runs of several tables are made once."
    for table in paper.table:
        yield from _table(paper, table)
    yield from _laptop(paper)
    yield from (
        "",
        "## Settings that all methods share",
        "",
        "| setting | keys | place in the paper | |",
        "|---|---|---|---|",
    )
    for fact in paper.fact:
        keys = ", ".join(f"`{key}`" for key in fact.keys)
        yield f"| {fact.what} | {keys} | {fact.place} | {fact.note} |"
    yield from ("", "## What a method may change", "", "| method | keys | place in the paper | |", RULE)
    for each in paper.allowed:
        keys = ", ".join(f"`{key}`" for key in each.keys)
        yield f"| {', '.join(f'`{name}`' for name in each.methods) or 'any'} | {keys} | {each.place} | {each.why} |"
    yield from ("", "## What cannot be made again", "")
    for missing in paper.missing:
        yield f"- **{missing.what}**: {missing.why}."


def _laptop(paper: Paper) -> Iterator[str]:
    yield from ("", "## On a laptop", "")
    yield f"{paper.main} and every kind of figure, by the same commands, from the tiny task's problems in the form of"
    yield "the paper's sets. Minutes on two cores; the numbers compare with nothing. Training problems that are"
    yield "evaluated too are left out here (`--against`), for the tiny sets share some; the full-size commands keep all"
    yield "that a paper trains on."
    yield from ("", "```bash", *chain(paper, paper.tables(paper.main), all_steps=True), "```")


def _table(paper: Paper, table: PaperTable) -> Iterator[str]:
    yield from ("", f"## {table.name}: {table.title}", "")
    if table.note:
        yield from (table.note, "")
    yield from ("| row | made by |", "|---|---|")
    for row in table.rows:
        name = f"{row.group}: {row.label}" if row.group else row.label
        yield f"| {name} | {_made_by(row)} |"
    yield ""
    if table.suite:
        suite = paper.name if table.suite == "suite.toml" else f"recipes/papers/{paper.name}/{table.suite}"
        yield f"Evaluation: `{PROGRAM} evaluate MODEL --suite {suite} --out DIR`, with `--allow-shorter` where it"
        yield "asks for more tokens than the model has positions."
    if table.analysis:
        places = {"runs": "RUN ...", "models": "MODEL ...", "samples": "DIR/samples ..."}
        yield f"Figure: `{PROGRAM} {table.analysis.format(**places)}`."
    if table.columns:
        yield f"Table: `{PROGRAM} paper {paper.name} --table {shlex.quote(table.name)}`."


def _made_by(row: Row) -> str:
    why = row.why
    if row.model:
        made = f"the model `{row.hub or row.model}` as it is"
    elif row.recipe:
        made = f"`{train_command(row, row_config(row))}`"
    else:
        return f"not made: {why}"
    return f"{made}; {why}" if why else made

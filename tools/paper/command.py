"""A paper's tables and figures: what makes each row, what of it is here, and our numbers beside the published ones.

    megatron-entropy paper siren                         every row: what is there, and the next command
    megatron-entropy paper siren --table 1               one table; with evaluations, the paper's columns and ours
    megatron-entropy paper siren --table 1 --out t1.png  the same in a file: .md, .json or .png
    megatron-entropy paper siren --differences           in what the methods differ, and where the paper says so
    megatron-entropy paper siren --tiny                  the main table and the figures on the tiny task, on a laptop
    megatron-entropy paper siren --tiny --commands | bash -e    all that is left to do, in order

What is there is looked for from the current directory: data/, recipes/models/, runs/. Exit codes: 0 done, 1 methods
differ in something that the paper does not name (--differences), 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich import markup
from rich.console import Console
from rich.table import Table

from megatron_ext.config.errors import ConfigError

from ..arguments import command_parser, output_file
from .differences import ABSENT, Compared, common, compare
from .readme import readme
from .results import Cell, Result, cells, write
from .rows import PROGRAM, Plan, analysis, plans
from .tables import Paper, PaperTable, papers, read_paper
from .tiny import chain, figures, tiny_plans

CELL_WIDTH = 16


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        if options.write:
            return _write_pages(console)
        if options.paper is None:
            raise ConfigError(f"name a paper: {', '.join(papers())}")
        paper = read_paper(options.paper)
        if options.differences:
            return _differences(paper, console)
        tables = paper.tables(options.table or (paper.main if options.tiny else ""))
        if options.commands:
            print("\n".join(_commands(paper, tables, options.tiny)))
            return 0
        _map(paper, tables, options, console)
    except ConfigError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    return 0


def _map(paper: Paper, tables: Sequence[PaperTable], options: argparse.Namespace, console: Console) -> None:
    """Each table's rows with their next commands, then the tables that have results."""
    say(console, f"{paper.title}\narXiv {paper.arxiv}" + ("; the tiny task in its place" if options.tiny else ""))
    found = []
    for table in tables:
        made = tiny_plans(paper, table) if options.tiny else plans(paper, table)
        then = figures(paper, made) if options.tiny else [analysis(table, made)] if table.analysis else []
        _rows(table, made, then, console)
        if table.columns:
            found.append(Result(table, made, [cells(table, plan) for plan in made], options.tiny))
    for each in found:
        if any(cell.ours is not None for row in each.rows for cell in row):
            _result(each, console)
    if not options.table and not options.tiny:
        say(console, "\nWhat cannot be made again:")
        for missing in paper.missing:
            say(console, f"  {missing.what}: {missing.why}")
    if options.out is not None:
        write(options.out, found)
        say(console, f"wrote {options.out}")


def _rows(table: PaperTable, made: Sequence[Plan], then: Sequence[str], console: Console) -> None:
    say(console, f"\n{table.name}. {table.title}")
    if table.note:
        say(console, f"  {table.note}")
    group, told = "", set()
    for plan in made:
        if plan.row.group != group:
            group = plan.row.group
            say(console, f"  {group}")
        state = ", ".join(f"{step.what} {step.state}" for step in plan.steps)
        say(console, f"  {plan.row.label}: {state or 'not made'}" + (f" ({plan.row.why})" if plan.row.why else ""))
        step = plan.next_step
        if step is None:
            continue
        if step.commands and step.commands[0] in told:
            say(console, f"    next: {step.what}, as above")
        for command in step.commands:
            if command not in told:
                told.add(command)
                say(console, f"    {command}")
    for command in then:
        say(console, f"  then: {command}")


def _result(result: Result, console: Console) -> None:
    """The paper's columns, as many beside each other as fit."""
    columns, made = result.table.columns, result.plans
    label = max(len(plan.row.label) for plan in made) + 2
    across = max(1, (console.width - label) // CELL_WIDTH)
    for first in range(0, len(columns), across):
        title = result.heading if first == 0 else None
        shown = Table(title=title, title_justify="left", show_lines=True)
        shown.add_column("")
        for head, _, _ in columns[first : first + across]:
            shown.add_column(markup.escape(head), justify="right")
        for plan, row in zip(made, result.rows, strict=True):
            shown.add_row(markup.escape(plan.row.label), *(_cell(cell) for cell in row[first : first + across]))
        console.print(shown)
    if result.note:
        say(console, result.note)


def _cell(cell: Cell) -> str:
    ours = "-" if cell.ours is None else f"{cell.ours:.1f}"
    lines = [ours, cell.interval, "" if cell.published is None else f"paper {cell.published:.1f}"]
    return "\n".join(line for line in lines if line)


def _commands(paper: Paper, tables: Sequence[PaperTable], tiny: bool) -> list[str]:
    """All that is left to do, each once, in order."""
    if tiny:
        return chain(paper, tables, all_steps=False)
    made = [plan for table in tables for plan in plans(paper, table)]
    left = [command for plan in made for step in plan.steps if not step.done for command in step.commands]
    shown = [f"{PROGRAM} paper {paper.name} --table '{table.name}'" for table in tables]
    return list(dict.fromkeys([*left, *shown]))


def _differences(paper: Paper, console: Console) -> int:
    say(console, f"{paper.title}\narXiv {paper.arxiv}\n\nWhat all methods share")
    for fact, values in common(paper):
        note = f"; {fact.note}" if fact.note else ""
        say(console, f"  {fact.what}: {' | '.join(values)}  [{fact.place}{note}]")
    unnamed = 0
    for each in compare(paper):
        unnamed += _told(each, console)
    if unnamed:
        say(console, f"\n{unnamed} differences that the paper does not name")
    return 1 if unnamed else 0


def _told(compared: Compared, console: Console) -> int:
    """The differences of a run by the paper's places; returns how many of them the paper does not name."""
    say(console, f"\n{compared.run}, from {compared.baseline or 'none: the only method with this model'}")
    places: dict[str, list[str]] = {}
    for each in compared.differences:
        place = each.allowed.place if each.allowed else "NOT NAMED BY THE PAPER"
        before = "" if each.other == ABSENT else f" (baseline {each.other})"
        places.setdefault(place, []).append(f"{each.key.removeprefix('method.')} {each.value}{before}")
    for place, found in places.items():
        say(console, f"  {', '.join(found)}  [{place}]")
    return sum(each.allowed is None for each in compared.differences)


def _write_pages(console: Console) -> int:
    for name in papers():
        paper = read_paper(name)
        path = paper.folder / "README.md"
        path.write_text(readme(paper), encoding="utf-8")
        say(console, f"wrote {path}")
    return 0


def say(console: Console, text: str) -> None:
    """A line as it is: commands are to be copied."""
    console.print(text, markup=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("paper", __doc__)
    add = parser.add_argument
    add("paper", nargs="?", metavar="PAPER", help=", ".join(papers()))
    add("--table", default="", help="such as 1, 'Table 1' or 'Figure 5' (all)")
    add("--tiny", action="store_true", help="every method on the tiny task instead; without --table the main one")
    add("--commands", action="store_true", help="only the commands that are left, in order")
    add(
        "--differences",
        action="store_true",
        help="in what the methods differ from the baseline, with the paper's place",
    )
    add("--out", type=output_file, metavar="FILE", help="also write the tables: .md, .json, or .png of one table")
    add("--write", action="store_true", help="write every paper's README.md from its tables.toml (in a checkout)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

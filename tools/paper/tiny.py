"""A paper's chain on a laptop, in a few minutes, under ``runs/tiny/``: data, training with validation, suite, figures.

The tiny task's problems come in the form of the paper's sets, so that every command of the full chain is the same but
for its files and sizes. The table has the paper's columns; its numbers compare with nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.loading import read_config
from megatron_ext.config.public_sets import public_sets
from megatron_ext.config.shipped import RECIPES

from .rows import (
    PROGRAM,
    Plan,
    Step,
    analysis,
    exported,
    here,
    quoted,
    row_config,
    run_name,
    suite_argument,
    suite_files,
    suite_name,
    trained,
)
from .tables import Paper, PaperTable, Row

FOLDER = Path("runs") / "tiny"
DATA = FOLDER / "data"
PUBLIC = RECIPES / "tiny" / "data" / "public"  # written by tools/tiny/public_sets.py
BASE = RECIPES / "tiny" / "base"
RECIPE = "{method}-tiny-cpu"
STEPS = 2
SIZES = ("rollout.prompts=8", "parallel.ranks_per_node=1", "parallel.tensor=1")  # seconds, in one process
VALIDATION = ("validation.every=1", "validation.samples=2", "validation.keep_best=true")
EVALUATION = "--samples 8 --max-prompt-tokens 64 --max-response-tokens 32"
NO_PROMPT = "--system= --prefix= --suffix= --answer-format boxed"  # the tiny model knows the tiny task's own prompt


def tiny_plans(paper: Paper, table: PaperTable) -> list[Plan]:
    """The plan of each row that the paper names for its ``tiny`` table; of another table, of each that can be made."""
    rows = [row for row in table.rows if row.recipe or row.model]
    chosen = [row for row in rows if (row.recipe or row.model) in paper.tiny and not row.overrides]
    return [_plan(paper, table, row) for row in chosen or rows]


def figures(paper: Paper, made: Sequence[Plan]) -> list[str]:
    """The commands that draw every kind of figure that the paper has, from the rows of the tiny table."""
    made = [plan for plan in made if plan.evaluation]
    kinds: dict[str, PaperTable] = {}
    for table in paper.table:
        if table.analysis:
            kinds.setdefault(" ".join(table.analysis.split()[:2]), table)
    found = [_tiny_files(analysis(table, made)) for table in kinds.values()]
    for number, (table, command) in enumerate(zip(kinds.values(), found, strict=True)):
        out = FOLDER / paper.name / table.name.lower().replace(" ", "-")
        if command.startswith(f"{PROGRAM} compare"):
            found[number] = re.sub(r"--out \S+", f"--out {out}.html", command)
        else:
            found[number] = f"{command} --out {out}"
    return found


def chain(paper: Paper, tables: Sequence[PaperTable], *, all_steps: bool) -> list[str]:
    """The commands from the data to the tables and figures, each once, in order; or those that are left."""
    found: list[str] = []
    for table in tables:
        made = tiny_plans(paper, table)
        steps = [step for plan in made for step in plan.steps if all_steps or not step.done]
        found += [command for step in steps for command in step.commands]
        out = f"{FOLDER / paper.name / table.name.lower().replace(' ', '-')}"
        found += [f"{PROGRAM} paper {paper.name} --tiny --table {shlex.quote(table.name)} --out {out}.png"]
        found += figures(paper, made)
    return list(dict.fromkeys(found))


def _tiny_files(command: str) -> str:
    command = re.sub(r"(?<!\S)data/(?=\S+\.jsonl)", f"{DATA}/", command)
    return re.sub(r"recipes/models/\S+", str(here(BASE)), command)


def _plan(paper: Paper, table: PaperTable, row: Row) -> Plan:
    suite = paper.folder / table.suite if table.suite else None
    sets = [Path(file).stem for file in suite_files(suite)] if suite else []
    steps = list(_sets(sets))
    if row.recipe:
        run, trains = _run(row, sets)
        steps += trains
        model = run / "hf"
        steps.append(exported(run, best=True))
    else:
        run, model = None, here(BASE)
    if suite is None:
        return Plan(row, tuple(steps), run=run, model=model)
    results = run / "evaluation" if run else FOLDER / paper.name / "base"
    out = results / f"{suite_name(suite)}.json"
    command = f"{PROGRAM} evaluate {quoted(model)} --suite {suite_argument(suite)} --data-dir {DATA} {EVALUATION}"
    command += f"{'' if run else f' {NO_PROMPT}'} --out {quoted(results)}"
    steps.append(Step.of_file("evaluated", out, command))
    return Plan(row, tuple(steps), out, run, model)


def _run(row: Row, sets: Sequence[str]) -> tuple[Path, list[Step]]:
    """The same method with the same options, on the tiny task in the form of the paper's training set."""
    full = row_config(row)
    data = Path(full.data.train).stem
    recipe = RECIPE.format(method=full.method["name"])
    own = [f"method.{key}={_toml(value)}" for key, value in full.method.items() if key != "name"]
    own += [f"data.train={DATA / data}.jsonl", *SIZES]
    made = [_made(each, sets) for each in (*public_sets()[data].parts, data)]
    curriculum = DATA / f"{data}.semantic_entropy.jsonl" if full.data.curriculum else None
    if curriculum:
        sort = shlex.join([PROGRAM, "semantic-entropy", recipe, *own, "--out", str(curriculum)])
        made.append(Step.of_file("curriculum", curriculum, sort))
    name = f"tiny/{run_name(row)}"
    validated = [f"validation.data={DATA / sets[0]}.jsonl", *VALIDATION] if sets else []
    own += [f"data.curriculum={curriculum or ''}"] if read_config(recipe).data.curriculum else []
    changes = [*own, *validated, f"train.steps={STEPS}", f"name={name}"]
    folder = Path(read_config(recipe, changes).log.dir) / name
    return folder, [*made, trained(folder, STEPS, shlex.join([PROGRAM, "train", recipe, *changes]))]


def _sets(names: Sequence[str]) -> Iterator[Step]:
    for name in names:
        yield _made(name)


def _made(name: str, against: Sequence[str] = ()) -> Step:
    """A set's file, from the tiny task in its form; training sets without the problems that are evaluated."""
    file = DATA / f"{name}.jsonl"
    parts = public_sets()[name].parts
    sources = [str(DATA / f"{part}.jsonl") for part in parts] or [quoted(PUBLIC / name)]
    beside = [] if parts or not against else ["--against", *(str(DATA / f"{each}.jsonl") for each in against)]
    command = " ".join([PROGRAM, "data", name, *sources, *beside, "--out", str(file)])
    return Step.of_file(name, file, command)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""A row of a table as files and commands: what makes it, what of that is there, and what is to be typed next."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.manifest import TRACKER
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.loading import read_config
from megatron_ext.config.positions import max_positions
from megatron_ext.config.public_sets import how_to_make
from megatron_ext.config.schema import Config
from megatron_ext.config.shipped import RECIPES, find, find_recipe, outside

from ..recipes import slurm_command
from .tables import Paper, PaperTable, Row

PROGRAM = "megatron-entropy"


@dataclass(frozen=True)
class Step:
    """One thing that a row needs: whether it is ``done``, in words, and the commands that do it."""

    what: str
    done: bool
    state: str
    commands: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, what: str, file: Path, *commands: str) -> Step:
        """Done when ``file`` is there."""
        done = file.is_file()
        return cls(what, done, "yes" if done else "no", commands)


@dataclass(frozen=True)
class Plan:
    """A row and its steps, in their order; the suite's result, the run's folder and the model, where it has them."""

    row: Row
    steps: tuple[Step, ...]
    evaluation: Path | None = None
    run: Path | None = None
    model: Path | None = None

    @property
    def next_step(self) -> Step | None:
        return next((step for step in self.steps if not step.done), None)


def plans(paper: Paper, table: PaperTable) -> list[Plan]:
    """The plan of each row. Raises ConfigError for a recipe that cannot be read."""
    return [_plan(paper, table, row) for row in table.rows]


def _plan(paper: Paper, table: PaperTable, row: Row) -> Plan:
    if not (row.recipe or row.model):
        return Plan(row, ())
    suite = paper.folder / table.suite if table.suite else None
    if row.recipe:
        config = row_config(row)
        validated = config.validation.data if config.validation.every else []
        run, steps = _run(row, config, _sets([*validated, *(suite_files(suite) if suite else [])]))
        model, results, source = run / "hf", run / "evaluation", Path(config.model.path)
        steps = [*steps, exported(run, best=config.validation.every > 0)] if suite else steps
    else:
        model = here(RECIPES / "models" / row.model)
        results = Path("runs") / row.model / paper.name  # papers ask the same model different things
        source = model
        run, steps = None, [_weights(model, row.hub or hub_of(paper, row.model))]
    if suite is None:
        return Plan(row, tuple(steps), run=run, model=model)
    out = results / f"{suite_name(suite)}.json"
    command = f"{PROGRAM} evaluate {quoted(model)} --suite {suite_argument(suite)} --out {quoted(results)}"
    command += f"{' --allow-shorter' if _too_long(suite, source) else ''} --engine vllm"
    steps = [*steps, *(() if row.recipe else _sets(suite_files(suite))), Step.of_file("evaluated", out, command)]
    return Plan(row, tuple(steps), out, run, model)


def _too_long(suite: Path, model: Path) -> bool:
    """Whether the suite asks for more tokens than a model has positions, or may: ``model`` is not there yet."""
    if not (suite.is_file() and (model / "config.json").is_file()):
        return True
    asked = tomllib.loads(suite.read_text(encoding="utf-8"))
    longest = max(each.get("max_response_tokens", 0) for each in (asked["defaults"], *asked["set"]))
    positions = max_positions(read_hf_config(model))
    return positions is not None and longest >= positions


def run_name(row: Row) -> str:
    """The run of a row: its recipe's, and in short what is overridden."""
    parts = (_short(row, *override.split("=", 1)) for override in row.overrides)
    return "-".join([row.recipe, *filter(None, parts)])


def _short(row: Row, key: str, value: str) -> str:
    name = key.rpartition(".")[2]
    if name == "hub" or key.startswith(("data.stage_", "validation.")):  # the model's or the curriculum's name, or none
        return ""
    if value in ("", "false"):
        return f"no_{name}"
    if name == "curriculum":
        return f"curriculum{row.stages or ''}"
    return Path(value).name.removesuffix(".jsonl") if "/" in value else f"{name}{value}"


def analysis(table: PaperTable, made: Sequence[Plan]) -> str:
    """The command that draws the table's figure, with what its rows are made of; empty if there is none."""
    made_of = {
        "runs": [(plan, plan.run) for plan in made if plan.run],
        "samples": [(plan, plan.evaluation.parent / "samples") for plan in made if plan.evaluation],
        "models": [(plan, plan.model) for plan in made if plan.model],
    }
    parts = {name: " ".join(quoted(path) for _, path in found) for name, found in made_of.items()}
    if not table.analysis:
        return ""
    if len(made_of["runs"]) == 1 and table.analysis.startswith("compare"):
        return f"{PROGRAM} report {parts['runs']}"
    command = f"{PROGRAM} {table.analysis.format(**parts)}"
    inputs = re.search(r"\{(\w+)\}", table.analysis)
    labels = [plan.row.label for plan, _ in made_of[inputs[1]]] if inputs else []
    if not table.analysis.startswith("analyze") or len(set(labels)) < len(labels):
        return command
    return f"{command} --labels {shlex.join(labels)}"


def row_config(row: Row) -> Config:
    """The configuration of a row with a recipe. Raises ConfigError."""
    return read_config(row.recipe, list(row.overrides))


def suite_argument(suite: Path) -> str:
    """What ``--suite`` is given: the paper's name, or the file of a further suite of it."""
    return shlex.quote(str(here(suite)) if suite.stem != "suite" else suite_name(suite))


def suite_name(suite: Path) -> str:
    """The name under which the evaluation writes its result: that of the folder, or of a further suite's file."""
    return suite.parent.name if suite.stem == "suite" else suite.stem


def hub_of(paper: Paper, model: str) -> str:
    """The Hub's id of a model, as the paper's recipes name it; empty where none has it."""
    named = (row.recipe for table in paper.table for row in table.rows if row.recipe and not row.overrides)
    configs = (read_config(recipe) for recipe in dict.fromkeys(named))
    return next((config.model.hub for config in configs if Path(config.model.path).name == model), "")


def _run(row: Row, config: Config, sets: Iterable[Step]) -> tuple[Path, list[Step]]:
    """The folder of a row's run, and the steps to it: ``sets`` are what it validates on and is evaluated on."""
    folder = Path(config.log.dir) / run_name(row)
    steps = [*_data(Path(config.data.train), config.data.hub), _weights(Path(config.model.path), config.model.hub)]
    if config.data.curriculum:
        sort = f"{PROGRAM} semantic-entropy {row.recipe} --out {quoted(Path(config.data.curriculum))}"
        sort += f" --stages {row.stages}" if row.stages else ""
        steps.append(Step.of_file("curriculum", Path(config.data.curriculum), sort))
    return folder, [*steps, *sets, trained(folder, config.train.steps, train_command(row, config))]


def train_command(row: Row, config: Config) -> str:
    """What makes a row's run; on several nodes a job is submitted, which no command here can wait for."""
    overrides = [*row.overrides, *([f"name={run_name(row)}"] if row.overrides else [])]
    if config.parallel.nodes == 1:
        return shlex.join([PROGRAM, "train", row.recipe, *overrides])
    return slurm_command(here(find_recipe(row.recipe)), overrides)


def trained(folder: Path, steps: int, command: str) -> Step:
    tracker = folder / "checkpoints" / TRACKER
    found = re.search(r"\d+", tracker.read_text(errors="replace")) if tracker.is_file() else None
    at = int(found[0]) if found else 0
    return Step("run", at >= steps, f"{at}/{steps}" if at else "no", (command,))


def exported(folder: Path, *, best: bool) -> Step:
    """``best``: the paper reports the best validated checkpoint."""
    command = f"{PROGRAM} convert to-hf {quoted(folder)} {quoted(folder / 'hf')}{' --best' if best else ''}"
    return Step.of_file("export", folder / "hf" / "config.json", command)


def _weights(model: Path, hub: str) -> Step:
    done = any(model.glob("*.safetensors"))
    fetch = (f"hf download {shlex.quote(hub)} --local-dir {quoted(model)}",) if hub else ()
    return Step("weights", done, "yes" if done else "no", fetch)


def _data(file: Path, hub: str) -> Iterator[Step]:
    manifest = file.with_suffix(".manifest.json")
    state = "no" if not file.is_file() else "yes" if manifest.is_file() else "no manifest"
    yield Step("data", file.is_file(), state, make_data(file, hub))


def _sets(data: Sequence[str]) -> Iterator[Step]:
    files = list(dict.fromkeys(map(find, data)))
    if not files:
        return
    lacking = [file for file in files if not file.is_file()]
    commands = tuple(command for file in lacking for command in make_data(file, ""))
    yield Step("sets", not lacking, f"{len(files) - len(lacking)}/{len(files)}", commands)


def make_data(file: Path, source: str) -> tuple[str, ...]:
    """What makes a file of problems, from a known public set or else from a local copy."""
    if known := how_to_make(here(file)):
        return tuple(line.strip() for line in known.splitlines())
    return (f"{PROGRAM} data {file.stem} SOURCE --out {quoted(file)}" + (f"  # SOURCE: {source}" if source else ""),)


def suite_files(suite: Path) -> list[str]:
    if not suite.is_file():
        return []
    return [each["data"] for each in tomllib.loads(suite.read_text(encoding="utf-8"))["set"]]


def here(path: Path) -> Path:
    """As a user in the current directory would type it."""
    given = Path(outside(str(path)))
    return given.relative_to(Path.cwd()) if given.is_relative_to(Path.cwd()) else given


def quoted(path: Path) -> str:
    return shlex.quote(str(here(path)))

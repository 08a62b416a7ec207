"""What a lab runs, a plan such as ``recipes/lab/lab.toml``, as commands of the tools.

``every_method`` adds the methods that the plan does not mention, ``exact_table`` the page's section of
tools/tiny/tabular.py, ``[[curve]]`` metrics that are kept and drawn beside entropy, right answers and lengths.

A run is a recipe with overrides, once per seed. It trains, exports and evaluates with the ordinary commands, so
each of its lines can be typed by hand. ``start = "other"`` begins from the model that run ``other`` left with the same
seed instead of the recipe's. ``like = "other"`` takes the recipe and the overrides of a run above it.
``first_seed = 100`` counts the run's seeds from there: it sees other problems and samples than the rest of the plan.

``[[regime]]`` tables run everything once under each of several settings (regimes.py); ``tuning`` and ``chosen`` give
every run the same number of trials of other values, and a tuned run (tuning.py). Such a plan's page is a league
(league_page.py), which needs no list of claims.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_ext import methods
from megatron_ext.checkpoint.manifest import differing_keys
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.config.schema import Config
from megatron_ext.config.shipped import find

from .regimes import Regime, Setting, expand, in_regime, read_regimes
from .tuning import Tuning, read_tuning, waiting, with_tuning

RECIPES = Path("recipes")
EVALUATION, LABEL = "evaluation.json", "after"
BASE = "base"  # the name of the untrained model's evaluation
Command = tuple[str, ...]


@dataclass(frozen=True)
class LabRun:
    """One entry of the plan, for all its seeds."""

    name: str
    recipe: Path
    set: tuple[str, ...] = ()
    start: str | None = None
    family: str = ""
    note: str = ""
    first_seed: int = 0  # train.seed of the run's seed 0
    base: str = ""  # the entry's name, without regime and trial
    regimes: tuple[str, ...] | None = None  # that have it; None: all
    regime: str = ""
    setting: Setting = ""
    stage: int = 0  # jobs of a lower one come first
    num_seeds: int | None = None  # None: the plan's

    @property
    def group(self) -> str:
        """Its regime, whether it is a trial or tuned, and its family where other regimes do not have it."""
        return ", ".join(filter(None, (self.regime, self.setting or (self.family if self.regimes else ""))))

    @property
    def has_own_model(self) -> bool:
        """Whether it begins with another model than the plan's first run."""
        return any(override.startswith("model.path=") for override in self.set)


@dataclass(frozen=True)
class Details:
    """A section of the page that puts one method's runs side by side, instead of its family's figures."""

    title: str = ""
    family: str = ""
    figures: tuple[tuple[str, dict[str, str]], ...] = ()  # title, label -> run
    tokens: tuple[str, ...] = ()  # runs of which it says where their entropy is


@dataclass(frozen=True)
class CurveShown:
    """A metric of the steps that the page draws for each family."""

    key: str
    title: str
    note: str = ""
    percent: bool = False


@dataclass(frozen=True)
class LabPlan:
    title: str
    claims: Path  # the list of claims; a plan with regimes has none
    runs: tuple[LabRun, ...]
    baseline: str  # the run that every family is compared with
    details: Details
    families: dict[str, str]  # key -> title, in the order of the page
    set: tuple[str, ...]
    evaluate: tuple[str, ...]  # options of evaluate; the data first
    seeds: int
    exact_table: bool = False
    curves: tuple[CurveShown, ...] = ()
    steps: int | None = None  # instead of the recipes'
    regimes: tuple[Regime, ...] = ()
    tuning: Tuning | None = None
    waiting: str = ""  # which tuned runs are not planned yet, and why

    def seeds_of(self, run: LabRun) -> range:
        return range(self.seeds if run.num_seeds is None else min(self.seeds, run.num_seeds))

    def baseline_in(self, regime: str) -> str:
        return in_regime(self.baseline, regime)

    def select(self, patterns: Sequence[str]) -> LabPlan:
        """Only runs whose name matches a pattern, and those they start from. Raises ConfigError if one matches none."""
        for pattern in patterns:
            if not any(fnmatch(run.name, pattern) for run in self.runs):
                names = ", ".join(run.name for run in self.runs)
                raise ConfigError(f"--only: no run is called {pattern!r}; the plan has {names}")
        wanted = {run.name for run in self.runs if any(fnmatch(run.name, pattern) for pattern in patterns)}
        wanted |= {run.start for run in self.runs if run.name in wanted and run.start}
        return replace(self, runs=tuple(run for run in self.runs if run.name in wanted))


@dataclass(frozen=True)
class Job:
    """A run with one seed: commands to do one after the other; it is finished when its evaluation exists."""

    name: str
    folder: Path
    commands: tuple[Command, ...]
    steps: int  # training steps; 0: only an evaluation
    needs: str | None = None  # the job whose model it starts from
    group: str = ""  # its run's
    prompts: int = 0  # of a step

    @property
    def finished(self) -> bool:
        return (self.folder / EVALUATION).exists()


def load_plan(path: Path) -> LabPlan:
    """Read a plan. Under ``every_method`` methods without an entry get one with their own recipe.

    Raises ConfigError for a faulty one.
    """
    path = find(path)
    if not path.is_file():
        raise ConfigError(f"--plan: no such file: {path}")
    content = tomllib.loads(path.read_text())
    known = {"title", "claims", "seeds", "set", "evaluate", "baseline", "families", "details", "run"}
    unknown = content.keys() - known - {"every_method", "exact_table", "curve", "regime", "tuning", "chosen"}
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(sorted(unknown))}")
    optional = {"details", "claims"} if "regime" in content else {"details"}
    if missing := known - optional - content.keys():
        raise ConfigError(f"{path}: missing keys {', '.join(sorted(missing))}")
    runs = list[LabRun]()
    for entry in content["run"]:
        runs.append(_run(path, entry, runs))
    mentioned = {run.name for run in runs}
    if content.get("every_method", False):
        others = [name for name in methods.METHODS if name not in mentioned and find(recipe_of(name)).is_file()]
        last = list(content["families"])[-1]
        runs += [LabRun(name, recipe_of(name), family=last, base=name) for name in others]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1 or (run.start and run.start not in names) or run.family not in content["families"]:
            raise ConfigError(f"{path}: run {run.name}: its name must be unique, its start a run, its family listed")
    if content.get("baseline") not in names:
        raise ConfigError(f"{path}: baseline: expected the name of a run, found {content.get('baseline')!r}")
    regimes, tuning = read_regimes(path, content, names), None
    if "tuning" in content:
        if not regimes or "chosen" not in content:
            raise ConfigError(f"{path}: tuning: expected regimes, and chosen, the file of what the trials chose")
        tuning = read_tuning(Path(content["tuning"]), Path(content["chosen"]))
        runs = with_tuning(path, runs, tuning)
    return LabPlan(
        content["title"],
        Path(content.get("claims", "")),
        tuple(expand(path, runs, regimes)),
        content["baseline"],
        _details(content.get("details")),
        content["families"],
        tuple(content["set"]),
        tuple(content["evaluate"]),
        int(content["seeds"]),
        content.get("exact_table", False),
        tuple(_curve(path, entry) for entry in content.get("curve", ())),
        regimes=regimes,
        tuning=tuning,
        waiting="" if tuning is None else waiting(tuning, path),
    )


def recipe_of(method: str) -> Path:
    return RECIPES / method / f"{method}-tiny-cpu.toml"


def _details(section: dict[str, Any] | None) -> Details:
    if section is None:
        return Details()
    figures = tuple((figure["title"], figure["runs"]) for figure in section["figure"])
    return Details(section["title"], section["family"], figures, tuple(section["tokens"]))


def _curve(path: Path, entry: dict[str, Any]) -> CurveShown:
    try:
        return CurveShown(**entry)
    except TypeError:
        expected = "key and title, and at most note and percent"
        raise ConfigError(f"{path}: curve {entry.get('key')}: expected {expected}, found {sorted(entry)}") from None


def _run(path: Path, entry: dict[str, Any], earlier: Sequence[LabRun]) -> LabRun:
    """``like`` names an earlier run, whose recipe and overrides come first; ``method`` whose recipe it is."""
    unknown = entry.keys() - {"name", "method", "like", "set", "start", "family", "note", "first_seed", "regimes"}
    if unknown or not {"name", "family"} <= entry.keys():
        raise ConfigError(f"{path}: run {entry.get('name')}: expected name and family, unknown keys {sorted(unknown)}")
    model = LabRun(entry["name"], recipe_of(entry.get("method", entry["name"])))
    if "like" in entry:
        model = next((run for run in earlier if run.name == entry["like"]), None)
        if model is None:
            raise ConfigError(f"{path}: run {entry['name']}: like {entry['like']!r} names no run above it")
    return LabRun(
        name=entry["name"],
        recipe=model.recipe,
        set=(*model.set, *entry.get("set", ())),
        start=entry.get("start"),
        family=entry["family"],
        note=entry.get("note", ""),
        first_seed=entry.get("first_seed", 0),
        base=entry["name"],
        regimes=tuple(entry["regimes"]) if "regimes" in entry else None,
    )


def configuration(plan: LabPlan, run: LabRun, seed: int, folder: Path) -> tuple[Config, Command]:
    """The checked configuration of a run with a seed, and the command that trains it."""
    overrides = [*plan.set, *run.set, f"train.seed={run.first_seed + seed}"]
    if plan.steps is not None:
        overrides.append(f"train.steps={plan.steps}")
    name = job_name(run.name, seed)
    overrides += [f"log.dir={toml_string(folder)}", f"name={toml_string(name)}"]
    try:
        config = load_config(run.recipe, overrides)
        methods.create(config.method)
    except ValueError as error:
        raise ConfigError(f"run {run.name}: {error}") from None
    if run.start:
        overrides.append(f"model.path={toml_string(model_folder(folder, run.start, seed))}")
    return config, ("train", str(run.recipe), *overrides)


def jobs(plan: LabPlan, folder: Path) -> list[Job]:
    """Every run and seed, seed by seed so that an early look has all methods; models to start from come first, and
    before all runs of a lower stage.

    Raises ConfigError for an invalid recipe or override, and for a finished run that was made with other settings.
    """
    first_recipe = load_config(plan.runs[0].recipe, [*plan.set])
    found = [Job(BASE, folder / BASE, (_evaluate(plan, first_recipe.model.path, folder / BASE),), 0)]
    starts = {run.start for run in plan.runs}
    in_order = [(run.stage, seed, run.name not in starts, run) for run in plan.runs for seed in plan.seeds_of(run)]
    for _, seed, _, run in sorted(in_order, key=lambda each: each[:3]):
        config, train = configuration(plan, run, seed, folder)
        own = folder / job_name(run.name, seed)
        export = ("convert", "to-hf", str(own), str(own / "hf"))
        needs = job_name(run.start, seed) if run.start else None
        commands = (train, export, _evaluate(plan, str(own / "hf"), own))
        found.append(Job(own.name, own, commands, config.train.steps, needs, run.group, config.rollout.prompts))
        check_made_so(own, config)
    return found


def check_made_so(folder: Path, config: Config) -> None:
    """Raises ConfigError when the folder holds a run with other settings: results of two labs must not mix."""
    path = folder / "config.json"
    if not path.is_file():
        return
    saved, now = json.loads(path.read_text()), config.model_dump(mode="json")
    differing = settings_that_differ(saved, now)
    differing.pop("model.path", None)
    if differing:
        lines = "\n".join(f"  {key}: was {old!r}, now {new!r}" for key, (old, new) in differing.items())
        raise ConfigError(f"{folder} was made with other settings; remove it, or choose another --dir\n{lines}")


def settings_that_differ(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, now). A section that one of the two does not know is no difference, but for a method's."""
    found = differing_keys(saved, now)
    return {key: pair for key, pair in found.items() if ".method." in f".{key}" or None not in pair}


def _evaluate(plan: LabPlan, model: str, folder: Path) -> Command:
    return ("evaluate", model, *plan.evaluate, "--out", str(folder / EVALUATION), "--label", LABEL)


def job_name(run: str, seed: int) -> str:
    return f"{run}-s{seed}"


def model_folder(folder: Path, start: str, seed: int) -> Path:
    return folder / job_name(start, seed) / "hf"


def toml_string(value: object) -> str:
    return f'"{value}"'

"""The same budget for every method: trials of a plan, what is chosen by them, and the tuned runs that follow.

A plan's ``tuning`` names a list such as ``recipes/league/tuning.toml``: for each run one axis, with ``budget`` values
beside the run's own. Each is a trial, one run with one seed that the plan does not have, in one regime. ``choose``
takes the best by OBJECTIVE, from results alone, and ``write_chosen`` leaves the file that the plan's ``chosen`` names.
With it a run ``siren`` has a tuned one, ``siren.tuned``, in every regime; where its own values were the best it is
the tuned one already, and nothing runs again.
"""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import find

from .regimes import in_regime

if TYPE_CHECKING:
    from .plan import LabPlan, LabRun
    from .results import Result, Results

OBJECTIVE = (
    "the share of right answers in training, mean over the last third of the steps; of the trials within one point of "
    "the best, the one that lost the fewest nats of its first step's entropy by then"
)
TIE = 0.01  # of right answers
DIGITS = 4
ENTROPY, RIGHT = "entropy/full", "reward/outcome/correct"


@dataclass(frozen=True)
class Axis:
    """What is tuned of a run: ``trials`` are overrides beside its own."""

    run: str
    title: str
    trials: tuple[tuple[str, ...], ...]

    def overrides(self, trial: int) -> tuple[str, ...]:
        """Of trial 0, which has the run's own values, none."""
        return self.trials[trial - 1] if trial else ()


@dataclass(frozen=True)
class Choice:
    """The best trial of a run and all trials' scores, that of the run's own values first."""

    trial: int
    right: tuple[float, ...]
    lost: tuple[float, ...]  # nats


@dataclass(frozen=True)
class Tuning:
    regime: str
    first_seed: int  # train.seed of the trials
    budget: int
    axes: tuple[Axis, ...]
    path: Path  # of the choices
    chosen: Mapping[str, Choice]  # by run


def read_tuning(path: Path, chosen: Path) -> Tuning:
    """The list at ``path`` with the choices that are there. Raises ConfigError for faulty files."""
    file = find(path)
    if not file.is_file():
        raise ConfigError(f"tuning: no such file: {path}")
    content = tomllib.loads(file.read_text())
    try:
        axes = tuple(
            Axis(entry["run"], entry["axis"], tuple(tuple(trial) for trial in entry["trials"]))
            for entry in content["axis"]
        )
        tuning = Tuning(content["regime"], content["first_seed"], content["budget"], axes, chosen, {})
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: {error}; expected regime, first_seed and budget, and [[axis]] with run, axis and trials"
        ) from None
    for axis in axes:
        if len(axis.trials) != tuning.budget or [other.run for other in axes].count(axis.run) > 1:
            raise ConfigError(
                f"{path}: axis of {axis.run}: found {len(axis.trials)} trials, expected {tuning.budget} in one axis a "
                "run: the budget is everybody's"
            )
    return replace(tuning, chosen=_read_chosen(tuning))


def with_tuning(path: Path, runs: Sequence[LabRun], tuning: Tuning) -> list[LabRun]:
    """The plan's runs, then every trial, then the tuned runs of which there is a choice. Raises ConfigError."""
    by_name = {run.name: run for run in runs}
    if unknown := [axis.run for axis in tuning.axes if axis.run not in by_name]:
        raise ConfigError(f"{path}: the tuning's axes are of runs that the plan has not: {', '.join(unknown)}")
    found = list(runs)
    for axis in tuning.axes:
        for trial in range(tuning.budget + 1):
            run = _like(by_name[axis.run], trial_name(axis.run, trial), axis.overrides(trial))
            found.append(
                replace(run, setting="trial", regimes=(tuning.regime,), first_seed=tuning.first_seed, num_seeds=1)
            )
    for axis in tuning.axes:
        choice = tuning.chosen.get(axis.run)
        if choice is not None and choice.trial:
            overrides = axis.overrides(choice.trial)
            found.append(replace(_like(by_name[axis.run], tuned_name(axis.run), overrides), setting="tuned"))
    return found


def _like(run: LabRun, name: str, overrides: Sequence[str]) -> LabRun:
    return replace(run, name=name, set=(*run.set, *overrides), note=" ".join(overrides) or "its own values")


def trial_name(run: str, trial: int) -> str:
    return f"{run}.trial{trial}"


def tuned_name(run: str) -> str:
    return f"{run}.tuned"


def waiting(tuning: Tuning, plan: Path) -> str:
    """A line on the runs that have no tuned one yet; "" where all have."""
    names = [axis.run for axis in tuning.axes if axis.run not in tuning.chosen]
    if not names:
        return ""
    which = "all methods" if len(names) == len(tuning.axes) else ", ".join(names)
    return (
        f"The tuned runs of {which} are left out: nothing is chosen yet. When their trials are finished, "
        f"megatron-entropy lab --plan {plan} --choose writes {tuning.path}."
    )


# --- the choice ---


def choose(plan: LabPlan, results: Results) -> dict[str, Choice]:
    """By run, of those whose trials are all finished."""
    tuning = plan.tuning
    assert tuning is not None
    found = {}
    for axis in tuning.axes:
        names = [in_regime(trial_name(axis.run, trial), tuning.regime) for trial in range(tuning.budget + 1)]
        if all(name in results for name in names):
            found[axis.run] = best([results[name] for name in names])
    return found


def best(trials: Sequence[Result]) -> Choice:
    """Of finished trials in their order, which decides where even the entropy is the same."""
    right = tuple(round(statistics.fmean(trial.late(RIGHT)), DIGITS) for trial in trials)
    lost = tuple(round(nats_lost(trial), DIGITS) for trial in trials)
    near = [i for i in range(len(trials)) if right[i] >= max(right) - TIE]
    return Choice(min(near, key=lambda i: (lost[i], i)), right, lost)


def nats_lost(trial: Result) -> float:
    """From the first step to the mean of the last third; a run that gained entropy lost none."""
    return max(0.0, statistics.fmean(trial.first(ENTROPY)) - statistics.fmean(trial.late(ENTROPY)))


def write_chosen(tuning: Tuning, choices: Mapping[str, Choice]) -> None:
    """The choices as TOML, in the order of the axes, with those of before that are not among them; what was chosen, by
    which scores."""
    choices = {**tuning.chosen, **choices}
    lines = [
        "# Made by megatron-entropy lab --choose from the trials' results. Trial 0 has the run's own values; right and",
        "# lost are the trials' scores in their order.",
        f"objective = {json.dumps(OBJECTIVE)}",
    ]
    for axis in tuning.axes:
        if choice := choices.get(axis.run):
            lines += [
                "",
                f"[run.{axis.run}]",
                f"trial = {choice.trial}",
                f"set = {json.dumps(list(axis.overrides(choice.trial)))}",
                f"right = {json.dumps(list(choice.right))}",
                f"lost = {json.dumps(list(choice.lost))}",
            ]
    tuning.path.parent.mkdir(parents=True, exist_ok=True)
    tuning.path.write_text("\n".join(lines) + "\n")


def _read_chosen(tuning: Tuning) -> dict[str, Choice]:
    file = find(tuning.path)
    if not file.is_file():
        return {}
    axes, found = {axis.run: axis for axis in tuning.axes}, {}
    for run, entry in tomllib.loads(file.read_text()).get("run", {}).items():
        try:
            choice = Choice(entry["trial"], tuple(entry["right"]), tuple(entry["lost"]))
            own = axes[run].overrides(choice.trial)
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{file}: run {run}: {error}; remove the file and choose again") from None
        if list(own) != entry["set"]:
            raise ConfigError(
                f"{file}: run {run}: chosen was {entry['set']}, but trial {choice.trial} is {list(own)} now: remove "
                "the file and choose again"
            )
        found[run] = choice
    return found

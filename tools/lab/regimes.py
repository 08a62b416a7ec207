"""Regimes: the settings under which a plan has each of its runs once, such as one update a step, or several.

    [[regime]]
    name = "lag-4"
    title = "Four steps of lag"
    set = ["rollout.max_lag=4"]        # comes after the run's own overrides
    of = { ppo = ["train.steps=80"] }  # and after these, for single runs and their tuned ones
    runs = ["grpo", "ppo"]             # no others; without it every run

The run ``ppo`` is then ``ppo@lag-4``. A run entry with ``regimes`` is in no others. The jobs of the plan come in the
order of the regimes, then the trials of a tuning (tuning.py), then runs that not every regime has, then tuned runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ext.config.errors import ConfigError

if TYPE_CHECKING:
    from .plan import LabRun

Setting = Literal["", "trial", "tuned"]  # "": as the plan's entry has it
SEPARATOR = "@"


@dataclass(frozen=True)
class Regime:
    name: str
    title: str
    set: tuple[str, ...] = ()
    of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    runs: tuple[str, ...] | None = None  # by their entries' names; None: all


def read_regimes(path: Path, content: Mapping[str, Any], names: Sequence[str]) -> tuple[Regime, ...]:
    """The plan's ``[[regime]]`` tables; ``names`` are those of its run entries. Raises ConfigError for faulty ones."""
    found = []
    for entry in content.get("regime", ()):
        known = {"name", "title", "set", "of", "runs"}
        if entry.keys() - known or not {"name", "title"} <= entry.keys():
            raise ConfigError(f"{path}: regime {entry.get('name')}: expected name and title, at most {sorted(known)}")
        runs, of = entry.get("runs"), {run: tuple(own) for run, own in entry.get("of", {}).items()}
        if unknown := {*(runs or ()), *of} - set(names):
            raise ConfigError(f"{path}: regime {entry['name']}: no run is called {', '.join(sorted(unknown))}")
        every = None if runs is None else tuple(runs)
        found.append(Regime(entry["name"], entry["title"], tuple(entry.get("set", ())), of, every))
    regimes = [regime.name for regime in found]
    for name in regimes:
        if regimes.count(name) > 1 or not name or set(name) & {SEPARATOR, "/", "*", "?", "["}:
            raise ConfigError(f"{path}: regime {name!r}: expected a name of its own, of a file, without {SEPARATOR}*?[")
    return tuple(found)


def expand(path: Path, runs: Sequence[LabRun], regimes: Sequence[Regime]) -> list[LabRun]:
    """Every run in every regime that has it; ``runs`` as they are where there are none.

    Raises ConfigError where a run names a regime that is none.
    """
    known = {regime.name for regime in regimes}
    for run in runs:
        if unknown := set(run.regimes or ()) - known:
            raise ConfigError(f"{path}: run {run.name}: no regime is called {', '.join(sorted(unknown))}")
    if not regimes:
        return list(runs)
    return [
        _within(run, regime, _stage(run, regime, number, len(regimes)))
        for number, regime in enumerate(regimes)
        for run in runs
        if (regime.runs is None or run.base in regime.runs and not run.setting)
        and (run.regimes is None or regime.name in run.regimes)
    ]


def in_regime(run: str, regime: str) -> str:
    """The name of a plan's run in a regime; "" is no regime."""
    return f"{run}{SEPARATOR}{regime}" if regime else run


def _within(run: LabRun, regime: Regime, stage: int) -> LabRun:
    return replace(
        run,
        name=in_regime(run.name, regime.name),
        set=(*run.set, *regime.of.get(run.base, ()), *regime.set),
        start=run.start and in_regime(run.start, regime.name),
        regime=regime.name,
        stage=stage,
    )


def _stage(run: LabRun, regime: Regime, number: int, count: int) -> int:
    """Jobs of a lower stage come first."""
    if run.setting == "trial":
        return count
    if run.setting == "tuned":
        return count + 2 + number
    return number if run.regimes is None and regime.runs is None else count + 1

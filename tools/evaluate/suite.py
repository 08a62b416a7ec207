"""Suites: the sets of a paper's table, how each is sampled, and which of its numbers the table shows.

[defaults]                             for all sets: samples, ks, temperature, top_p, max_prompt_tokens,
samples = 8                            max_response_tokens, metric
[prompt]                               for models that have no prompt of their own, such as base models
suffix = "..."
[[set]]
name = "aime24"
data = "data/aime24.jsonl"             from the current directory, or beside the suite; --data-dir names another folder
samples = 32                           in the place of the default
metric = "avg@32"                      the table's column: avg@N, maj@N, pass@K or acc; a list: several columns
title = "AIME24"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import PromptConfig
from megatron_ext.config.shipped import IS_INSTALLED, RECIPES, ROOT, find
from megatron_ext.files import first_fault, read_small

from .settings import Settings

FILE = "suite.toml"
FOLDERS = ("papers", "")  # below recipes/, where a suite's folder has its name
SAMPLED = ("samples", "ks", "temperature", "top_p", "max_prompt_tokens", "max_response_tokens")
METRIC = r"(?:avg|maj|pass)@[1-9][0-9]*|acc"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    samples: int | None = None
    ks: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    metric: str | list[str] | None = None


class _Set(_Table):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: str
    title: str = ""


class _Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    title: str = ""
    defaults: _Table = _Table()
    prompt: PromptConfig | None = None
    set: list[_Set] = Field(min_length=1)


@dataclass(frozen=True)
class SuiteSet:
    """One set of a suite. ``metrics``: names among the evaluation's metrics, one for each column of the table."""

    name: str
    title: str
    data: Path
    settings: Settings
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """``prompt`` None: the suite has none."""

    name: str
    title: str
    path: Path
    prompt: PromptConfig | None
    sets: tuple[SuiteSet, ...]

    def columns(self) -> int:
        """How many metrics of each set the table shows; as many averages."""
        return len(self.sets[0].metrics)


def find_suite(name: str) -> Path:
    """A file, or the suite that ships under this name. Raises ConfigError where there is none."""
    given = find(name)
    if given.is_file():
        return given
    shipped = {path.parent.name: path for folder in FOLDERS for path in (RECIPES / folder).glob(f"*/{FILE}")}
    if name not in shipped:
        raise ConfigError(
            f"--suite: no suite {name!r}; give a TOML file, or one of {', '.join(sorted(shipped)) or 'none that ship'}"
        )
    return shipped[name]


def read_suite(
    path: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    data_dir: Path | None = None,
    **common: Any,
) -> Suite:
    """The suite in ``path``. ``overrides`` hold for all sets, such as ``samples``; ``common`` are other Settings.

    ``data_dir``: where the sets' files are by their names, instead of the folders that the suite names. Columns follow
    overridden samples: avg@32 of 4 samples is avg@4. Raises ConfigError.
    """
    try:
        content = tomllib.loads(read_small(path).decode("utf-8-sig"))
        found = _Suite.model_validate(content)
    except OSError as error:
        raise ConfigError(f"--suite: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigError(f"--suite: {path}: {first_fault(error)}") from None
    except ValueError as error:  # TOML or UTF-8
        raise ConfigError(f"--suite: {path} is not TOML: {error}") from None
    names = [each.name for each in found.set]
    if len(set(names)) < len(names):
        raise ConfigError(f"--suite: {path}: two sets have the same name: {', '.join(names)}")
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"--only: {path} has no set {', '.join(unknown)}; it has {', '.join(names)}")
    chosen = [each for each in found.set if not only or each.name in only]
    data = {each.data: _data(path, each.data, data_dir) for each in chosen}
    if data_dir is not None and len(set(data.values())) < len(data):
        raise ConfigError(f"--data-dir: {path} has files of the same name in different folders: {', '.join(data)}")
    sets = tuple(_set(path, each, data[each.data], found.defaults, overrides or {}, common) for each in chosen)
    if len({len(each.metrics) for each in sets}) > 1:
        raise ConfigError(f"--suite: {path}: metric: expected as many columns of every set")
    name = path.parent.name if path.name == FILE else path.stem
    return Suite(name, found.title or name, path, _prompt(path, found.prompt), sets)


def missing_data(suite: Suite) -> str:
    """Every set whose data file is not there, and what makes it; empty if all are."""
    lacking = [each for each in suite.sets if not each.data.is_file()]
    lines = [
        f"  {each.name}: no {each.data}; make it with: megatron-entropy data {each.data.stem} SOURCE --out {each.data}"
        for each in lacking
    ]
    return "\n".join(lines)


def _set(
    path: Path, own: _Set, data: Path, defaults: _Table, overrides: Mapping[str, Any], common: dict[str, Any]
) -> SuiteSet:
    where = f"--suite: {path}: set {own.name}"
    found = {key: getattr(own, key) if getattr(own, key) is not None else getattr(defaults, key) for key in SAMPLED}
    found = {key: value for key, value in found.items() if value is not None}
    stated, default = found.get("samples", Settings().samples), Settings().samples
    found |= overrides
    samples, ks = found.get("samples", default), found.pop("ks", ())
    if own.ks is None or samples != stated:  # those of all sets, as far as this one's samples go
        ks = [k for k in ks if k <= samples]
    try:
        settings = Settings(**found, ks=tuple(ks), **common)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    metrics = own.metric if own.metric is not None else defaults.metric
    asked = [metrics] if isinstance(metrics, str) else [f"avg@{stated}"] if metrics is None else metrics
    shown = tuple(_metric(where, metric, stated, samples) for metric in asked)
    if not shown:
        raise ConfigError(f"{where}: metric: expected at least one")
    columns = [int(metric.removeprefix("pass@")) for metric in shown if metric.startswith("pass@")]
    settings = replace(settings, ks=tuple(sorted({*settings.reported_ks(), *columns})))
    return SuiteSet(own.name, own.title or own.name, data, settings, shown)


def _metric(where: str, asked: str, stated: int, samples: int) -> str:
    """The evaluation's name of a column's number, for ``samples`` in the place of the ``stated`` ones."""
    if not re.fullmatch(METRIC, asked):
        raise ConfigError(f"{where}: metric: found {asked!r}, expected avg@{stated}, maj@{stated}, pass@K or acc")
    kind, _, number = asked.partition("@")
    if kind == "acc":
        return f"avg@{samples}"
    if kind == "pass":
        if int(number) > stated:
            raise ConfigError(f"{where}: metric: {asked} needs as many samples, found samples = {stated}")
        return f"pass@{min(int(number), samples)}"
    if int(number) != stated:
        raise ConfigError(f"{where}: metric: {asked} is of {number} samples, found samples = {stated}")
    return f"{kind}@{samples}"


def _prompt(suite: Path, prompt: PromptConfig | None) -> PromptConfig | None:
    """With its template found from here or from the suite."""
    beside = suite.parent / (prompt.template if prompt else "")
    if prompt is None or not prompt.template or find(prompt.template).is_file() or not beside.is_file():
        return prompt
    return prompt.model_copy(update={"template": str(beside)})


def _data(suite: Path, data: str, folder: Path | None) -> Path:
    """By its name in ``folder``; without one from the current directory, else beside the suite, or in the checkout that
    the suite is from."""
    if folder is not None:
        return folder / Path(data).name
    places = [find(data), suite.parent / data, *([] if IS_INSTALLED else [ROOT / data])]
    return next((place for place in places if place.is_file()), Path(data))

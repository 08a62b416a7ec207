"""In what a paper's methods differ from its baseline: the keys of whole configurations, and where the paper has them.

A method's options are taken with their defaults, so that a default which differs from the baseline's is seen as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config
from megatron_ext.methods import create

from .rows import row_config, run_name
from .tables import Allowed, Fact, Paper, Row

ABSENT = "-"
NOT_THE_RUN = ("name", "method.name")


@dataclass(frozen=True)
class Difference:
    """``key`` is ``value`` in a row and ``other`` in its baseline. ``allowed`` None: the paper does not name it."""

    key: str
    value: str
    other: str
    allowed: Allowed | None


@dataclass(frozen=True)
class Compared:
    """A run and what differs in it from its baseline; none: the paper has no other method with this model."""

    run: str
    method: str
    baseline: str
    differences: tuple[Difference, ...]


def compare(paper: Paper) -> list[Compared]:
    """Every run of the paper's tables with the baseline of its model. Raises ConfigError."""
    baselines = {Path(read_config(name).model.path).name: name for name in paper.baselines}
    rows = {run_name(row): row for table in paper.table for row in table.rows if row.recipe}
    return [_compared(paper, run, row, baselines) for run, row in rows.items() if run not in paper.baselines]


def common(paper: Paper) -> Iterator[tuple[Fact, list[str]]]:
    """What the paper's methods share, with its value in each baseline."""
    configs = [_flat(read_config(name)) for name in paper.baselines]
    for fact in paper.fact:
        values = [
            " / ".join(value for key, value in flat.items() if any(_below(key, each) for each in fact.keys))
            for flat in configs
        ]
        yield fact, list(dict.fromkeys(value or ABSENT for value in values))


def _compared(paper: Paper, run: str, row: Row, baselines: dict[str, str]) -> Compared:
    config = row_config(row.model_copy(update={"until": 0}))  # a part of a run is no other method
    model = Path(read_config(row.recipe).model.path).name
    method, baseline = config.method["name"], baselines.get(model, "")
    if not baseline:
        return Compared(run, method, "", ())
    own, other = _flat(config), _flat(read_config(baseline))
    found = []
    for key in sorted(own.keys() | other.keys()):
        value, before = own.get(key, ABSENT), other.get(key, ABSENT)
        if value == before or key in NOT_THE_RUN or (value == ABSENT and key.startswith("method.")):
            continue  # options of the baseline's that this method does not have mean nothing in it
        if (value, before) == (str(None), ABSENT):
            continue  # nor does one of its own that is not set
        allowed = next((each for each in paper.allowed if each.covers(key, method)), None)
        found.append(Difference(key, value, before, allowed))
    return Compared(run, method, baseline, tuple(found))


def _flat(config: Config) -> dict[str, str]:
    """Every dotted key with its value; of the method all options."""
    found = dict(_leaves(config.model_dump(mode="json", exclude={"method"})))
    try:
        method = create(config.method)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    options = {f"method.{each.name}": _text(getattr(method, each.name)) for each in fields(method) if each.init}
    return {**found, **options, "method.name": config.method["name"]}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _leaves(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(each)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")

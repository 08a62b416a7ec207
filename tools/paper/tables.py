"""What a paper prints: ``recipes/papers/<paper>/tables.toml``, read and checked.

    title, arxiv, main = "Table 1"         the table that is meant where none is named
    tiny = ["..."]                         models and recipes: its rows that are made on the tiny task
    baselines = ["..."]                    recipes; the others of the same model are compared with them (differences.py)
    [[fact]]    what, keys, place, note    settings that all methods share, and where the paper has it
    [[allowed]] keys, methods, place, why  keys in which a method may differ from its baseline; no methods: all
    [[missing]] what, why                  what nobody can make again
    [[table]]   name, title, suite, columns, rows, analysis, note
        columns = [["AIME24 Maj@32", "aime24", "maj@32"], ...]   head, set and metric; set "mean" averages the others
        rows    = [{ label, group, recipe or model, set, hub, stages, published, why }, ...]

A row has a recipe with overrides ``set``, or a ``model`` (a folder of recipes/models) that is evaluated as it is, or
neither where ``why`` says that it cannot be made. ``published`` holds the paper's figures in the order of the columns,
nan where the paper has none. ``stages``: of a curriculum with another number of them than the default.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import RECIPES
from megatron_ext.files import first_fault, read_small

FILE = "tables.toml"
MEAN = "mean"  # a column's set: the mean of the other columns whose metric is of the same kind
LENGTH = "length"  # a column's metric: tokens of a response
ROMAN = ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Table):
    label: str
    group: str = ""
    recipe: str = ""
    model: str = ""
    set: tuple[str, ...] = ()
    hub: str = ""
    published: tuple[float, ...] = ()
    stages: int = 0
    until: int = 0  # steps after which the run ends and its last model is taken; 0: the recipe's, and the best
    why: str = ""

    @property
    def overrides(self) -> tuple[str, ...]:
        """Everything that the row sets over its recipe."""
        ends = (f"train.steps={self.until}", "validation.every=0") if self.until else ()
        return (*self.set, *ends)

    @model_validator(mode="after")
    def _has_one_source(self) -> Row:
        if bool(self.recipe) + bool(self.model) > 1 or not (self.recipe or self.model or self.why):
            raise ValueError(f"row {self.label!r}: expected a recipe or a model, or why there is neither")
        return self


class PaperTable(_Table):
    name: str
    title: str
    suite: str = ""
    columns: tuple[tuple[str, str, str], ...] = ()
    rows: tuple[Row, ...] = ()
    analysis: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _rows_fit(self) -> PaperTable:
        wrong = [row.label for row in self.rows if row.published and len(row.published) != len(self.columns)]
        if wrong:
            raise ValueError(
                f"{self.name}: {', '.join(wrong)}: expected a figure for each of {len(self.columns)} columns"
            )
        if self.columns and not self.suite:
            raise ValueError(f"{self.name}: columns need a suite")
        return self


class Fact(_Table):
    what: str
    keys: tuple[str, ...]
    place: str
    note: str = ""


class Allowed(_Table):
    keys: tuple[str, ...]
    methods: tuple[str, ...] = ()
    place: str
    why: str = ""

    def covers(self, key: str, method: str) -> bool:
        return key in self.keys and (not self.methods or method in self.methods)


class Missing(_Table):
    what: str
    why: str


class Paper(_Table):
    name: str
    title: str
    arxiv: str
    main: str
    tiny: tuple[str, ...]
    baselines: tuple[str, ...]
    fact: tuple[Fact, ...] = ()
    allowed: tuple[Allowed, ...] = ()
    missing: tuple[Missing, ...] = ()
    table: tuple[PaperTable, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _tiny_rows_are_there(self) -> Paper:
        there = {row.recipe or row.model for table in self.table if table.name == self.main for row in table.rows}
        if strangers := set(self.tiny) - there:
            raise ValueError(f"tiny: no row of {self.main} has {', '.join(sorted(strangers))}")
        return self

    @property
    def folder(self) -> Path:
        return RECIPES / "papers" / self.name

    def tables(self, asked: str = "") -> tuple[PaperTable, ...]:
        """The one that is ``asked`` for, by its name or its number alone; all without. Raises ConfigError."""
        if not asked:
            return self.table
        given = asked.lower()
        number = {given, ROMAN[int(given)] if given.isdecimal() and int(given) < len(ROMAN) else given}
        found = [each for each in self.table if given == each.name.lower()]
        found += [each for each in self.table if each.name.lower().split()[-1] in number]  # tables stand before figures
        if not found:
            names = ", ".join(each.name for each in self.table)
            raise ConfigError(f"--table: {self.name} has no {asked!r} here; expected one of {names}")
        return (found[0],)


def papers() -> list[str]:
    """The names of all papers."""
    return sorted(path.parent.name for path in (RECIPES / "papers").glob(f"*/{FILE}"))


def read_paper(name: str) -> Paper:
    """Raises ConfigError: no such paper, or a file that says something impossible."""
    names = papers()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {close[0]}? Papers: " if close else "expected one of "
        raise ConfigError(f"there is no paper {name!r}; {meant}{', '.join(names)}")
    path = RECIPES / "papers" / name / FILE
    try:
        paper = Paper.model_validate({"name": name, **tomllib.loads(read_small(path).decode())})
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    paper.tables(paper.main)
    return paper

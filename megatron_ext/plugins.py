"""A user's own code: what ``package.module:Name`` or ``path/to/file.py:Name`` in a recipe names, and its options.

A recipe names code by the keys of ``KEYS`` and by no others; nothing else in it is ever imported. Whoever starts a run
trusts its recipe (docs/security.md). No torch, and pydantic only where options are checked: methods import this.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NotRequired, get_type_hints

KEYS = (("method", "name"), ("rollout", "engine"), ("reward", "function"), ("model", "family"))
FORMS = "package.module:Name or path/to/file.py:Name"


def is_spec(name: str) -> bool:
    """Whether ``name`` is of the form ``module:Name``, and not one of ours."""
    return ":" in name


def load(spec: str, *, key: str) -> Any:
    """The object that ``spec`` names; ``key`` is the recipe's, for messages.

    Raises ValueError where there is no such module or name, and where importing it fails.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(f"{key}: found {spec!r}, expected {FORMS}")
    module = _from_file(Path(where), key=key) if where.endswith(".py") else _from_package(where, key=key)
    if name not in vars(module):
        public = [other for other in vars(module) if not other.startswith("_")]
        raise ValueError(f"{key}: {where} defines no {name}; {suggest(name, public)}")
    return vars(module)[name]


def suggest(word: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown ``word``."""
    known = sorted(known)
    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean {close[0]}?"
    return f"expected one of {', '.join(known)}" if known else "it has none"


def _from_package(name: str, *, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _not_imported(name, error, key=key) from error  # its own import of something else
        raise ValueError(
            f"{key}: no module {name} is found; install its package, put its folder on PYTHONPATH, or give "
            "path/to/file.py:Name"
        ) from None
    except Exception as error:
        raise _not_imported(name, error, key=key) from error


def _from_file(path: Path, *, key: str) -> ModuleType:
    """The module of one file, run once in a process."""
    path = path.resolve()
    name = f"own_code_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {path}; give a path from here or from the recipe")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(found)  # dataclasses look their module up
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _not_imported(str(path), error, key=key) from error
    return module


def _not_imported(where: str, error: Exception, *, key: str) -> ValueError:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ValueError(
        f"{key}: {where} cannot be imported: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
    )


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: its type, and its default unless it must be given."""

    type: Any
    default: Any = dataclasses.MISSING


@functools.cache
def options_of_class(cls: type) -> dict[str, Option]:
    """The options of a dataclass: the fields that are given when it is made."""
    hints = get_type_hints(cls)
    return {
        field.name: Option(
            hints[field.name],
            field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
        )
        for field in dataclasses.fields(cls)
        if field.init
    }


def options_of_function(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a function: its keyword-only parameters."""
    hints = get_type_hints(function)
    empty = inspect.Parameter.empty
    return {
        name: Option(hints.get(name, Any), dataclasses.MISSING if parameter.default is empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _expected(message: str) -> str:
    """Of pydantic's message what was expected, in a recipe's words."""
    return message.removeprefix("Input should be ").replace("a valid dictionary", "a table")


def check_options(given: Mapping[str, Any], known: Mapping[str, Option], *, section: str, owner: str) -> None:
    """Raise ValueError, a line for each fault, unless ``given`` are options of ``owner`` and of their types.

    Strict: ``1`` is no bool, ``"1"`` no number; a whole number is a float. ``section`` is the recipe's.
    """
    if not given and all(option.default is not dataclasses.MISSING for option in known.values()):
        return  # the planner asks of thousands of layouts, and a TypeAdapter takes milliseconds

    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from typing_extensions import TypedDict  # pydantic's own requirement: Python 3.11's will not do

    fields: Any = {
        name: option.type if option.default is dataclasses.MISSING else NotRequired[option.type]
        for name, option in known.items()
    }
    shape: Any = TypedDict("Options", fields)  # pyright: ignore
    shape.__pydantic_config__ = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    try:
        TypeAdapter(shape).validate_python(dict(given))
    except ValidationError as error:
        expected: dict[str, list[str]] = {}
        lines: list[str] = []
        for fault in error.errors():
            name = str(fault["loc"][0])
            if fault["type"] == "extra_forbidden":
                lines.append(f"{section}.{name}: {owner} has no such option; {suggest(name, known)}")
            elif fault["type"] == "missing" and name not in given:
                lines.append(f"{section}.{name}: missing; {owner} has no default for it")
            else:
                expected.setdefault(name, []).append(_expected(fault["msg"]))
        lines += [
            f"{section}.{name}: found {given[name]!r}, expected {' or '.join(all_)}" for name, all_ in expected.items()
        ]
        raise ValueError("\n".join(lines)) from None

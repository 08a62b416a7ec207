"""A recipe, its parents and the command line's overrides as one checked ``Config``. No torch.

A recipe holds only what differs from its parent (``parent = "../base.toml"``). ``load_config`` merges the
chain, applies ``key=value`` overrides from the command line and checks everything that can be checked
without building a model. Every fault is a ``ConfigError`` that says what, found, expected, what to do.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ext.config.aliases import unknown_keys, with_new_names
from megatron_ext.config.checks import check_layout, marked_checkpoint
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.redact import redact
from megatron_ext.config.schema import Config, PromptConfig
from megatron_ext.config.shipped import expected_at, find_recipe, shipped
from megatron_ext.files import read_json, read_small
from megatron_ext.plugins import KEYS

_PATHS = (
    *(("model", "path"), ("model", "weights"), ("data", "train"), ("data", "curriculum")),
    *(("prompt", "template"), ("validation", "data")),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe, its parents and ``key=value`` overrides (dotted keys, TOML values), and check them.

    A recipe that is no file may be a shipped one (``shipped.py``). Relative paths in ``model.path``, ``data.train``,
    ``data.curriculum``, ``prompt.template`` and ``validation.data`` are tried from the current directory first, then
    from the file that states them, then among what ships; data that is nowhere is expected in the second place. So are
    those of the user's own code (plugins.py).
    """
    config = read_config(path, overrides)
    check_layout(config)
    return config


def read_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """``load_config`` without the rules between fields. Of a marker, ``model.weights`` is what it named when the run
    began."""
    merged = _merge_chain(_read_chain(find_recipe(path)))
    for override in overrides or []:
        _apply_override(merged, override)
    given = [override.partition("=")[0] for override in overrides or []]
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_readable(error, path, given)) from None
    model = config.model.model_copy(update={"weights": _first_weights(config)})
    return config.model_copy(update={"prompt": with_template_text(config.prompt), "model": model})


def _first_weights(config: Config) -> str:
    """``model.weights``; of a marker what the run has begun from, or what it names now where there is no run yet."""
    given = config.model.weights
    named = marked_checkpoint(given)
    if named == given:
        return given
    try:
        kept = read_json(config.run_dir / "config.json")["model"]["weights"]
        is_here = os.path.dirname(kept) == os.path.dirname(given) and os.path.isdir(kept)
    except (OSError, ValueError, KeyError, TypeError):
        return named
    return kept if is_here else named


def with_template_text(prompt: PromptConfig) -> PromptConfig:
    """The prompt with the text of its template in place of the file's path, so that it is whole wherever it is kept.

    A template that is no path (it holds a brace or a line break) stays. Raises ConfigError for a file that cannot be
    read.
    """
    template = prompt.template
    if not template or re.search(r"[{\n]", template):
        return prompt
    try:
        text = read_small(Path(template)).decode()
    except FileNotFoundError:
        raise ConfigError(
            f"prompt.template: no such file: {template}; give a Jinja file, by a path from here or from the recipe"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"prompt.template: {template} cannot be read: {error}; expected Jinja in UTF-8") from None
    if not re.search(r"[{\n]", text):
        raise ConfigError(f"prompt.template: {template} is no chat template: it has no expression {{{{ ... }}}}")
    return prompt.model_copy(update={"template": text})


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an older version wrote, under today's names and with the keys that it did not have.

    Before there was ``rollout.sampling_replay``, a run with a nucleus trained on the whole policy.
    """
    merged = _merge(Config().model_dump(), with_new_names(config))
    if "sampling_replay" not in config.get("rollout", {}) and merged["rollout"]["top_p"] < 1:
        merged["rollout"]["sampling_replay"] = "off"
    return merged


def _merge_chain(chain: list[dict[str, Any]]) -> dict[str, Any]:
    """Each recipe of a chain over those before it. Another method's options are never inherited, nor another kind's.

    Those of a ``[method]`` above the first one with a name are no method's own: every method below has them.
    """
    merged: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for own in chain:
        before, after = _method(merged), _method(own)
        merged = _merge(merged, own)
        if "name" not in _method(merged):
            common = _method(merged)
        elif after.get("name", before.get("name")) != before.get("name"):
            merged["method"] = _merge(common, after, below_method=True)
    return merged


def _method(config: dict[str, Any]) -> dict[str, Any]:
    """The method's table; the schema says what is wrong with one that is none."""
    method = config.get("method")
    return method if isinstance(method, dict) else {}


def _read_chain(path: Path, children: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The recipe ``path`` after its parents, the uppermost first. ``children``: the recipes that led here."""
    own = _read_recipe(path)
    if path.resolve() in children:
        raise ConfigError(f"recipe: {path} is its own parent; a chain of parents ends with a recipe that names none")
    for name, key in _PATHS:
        section = own.get(name)
        if not isinstance(section, dict):
            continue  # the schema says what is wrong with it
        value, made_later = section.get(key), name in ("data", "validation")  # by a tool, where the recipe says
        if isinstance(value, str):
            section[key] = _resolved(value, path.parent, made_later=made_later)
        elif isinstance(value, list):
            section[key] = [
                _resolved(each, path.parent, made_later=made_later) if isinstance(each, str) else each for each in value
            ]
    _resolve_code(own, path.parent)
    parent = own.pop("parent", None)
    if parent is None:
        return [own]
    if not isinstance(parent, str):
        raise ConfigError(f"recipe: {path}: parent is {parent!r}, expected the path of one recipe")
    above = path.parent / parent
    above = above if os.path.exists(above) else shipped(parent) or above
    return [*_read_chain(above, (*children, path.resolve())), own]


def _resolved(value: str, folder: Path, *, made_later: bool) -> str:
    """A path of a recipe in ``folder``, as ``load_config`` looks for it."""
    if not value or os.path.exists(value):
        return value
    beside = os.path.normpath(folder / value)
    if not os.path.exists(beside) and (found := shipped(value)):
        return str(found)
    return expected_at(beside) if made_later or os.path.exists(beside) else value


def _resolve_code(own: dict[str, Any], folder: Path) -> None:
    """Paths of the user's own code, ``file.py:Name``, like those of files."""
    for section, key in KEYS:
        table = own.get(section)
        if not isinstance(table, dict) or not isinstance(value := table.get(key), str):
            continue
        file, colon, name = value.rpartition(":")
        if file.endswith(".py") and not os.path.exists(file) and os.path.exists(folder / file):
            table[key] = os.path.normpath(folder / file) + colon + name


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_small(path).decode())
    except FileNotFoundError:
        raise ConfigError(f"recipe: no such file: {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe: {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"recipe: {path} is not valid TOML: its values are nested too deeply") from None
    except (OSError, ValueError) as error:  # a folder, another user's, not UTF-8, a number of thousands of digits
        raise ConfigError(f"recipe: {path} cannot be read: {error}; expected a TOML file in UTF-8") from None


def _merge(base: dict[str, Any], own: dict[str, Any], *, below_method: bool = False) -> dict[str, Any]:
    """``own`` over ``base``, section by section. A method's table of another ``kind`` takes nothing over."""
    merged = dict(base)
    for key, value in own.items():
        both = _are_tables(base.get(key), value, same_kind=below_method)
        merged[key] = _merge(base[key], value, below_method=below_method or key == "method") if both else value
    return merged


def _are_tables(before: Any, value: Any, *, same_kind: bool) -> bool:
    """Whether both are tables and, where ``same_kind``, ``value`` names no other ``kind``."""
    if not isinstance(before, dict) or not isinstance(value, dict):
        return False
    return not same_kind or value.get("kind", before.get("kind")) == before.get("kind")


def _apply_override(merged: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"on the command line: {override!r} is not of the form key=value, for example train.steps=10")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": text}  # a string without its quotes
    except RecursionError:
        raise ConfigError(f"on the command line: {key}: its value is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"override: {key}: its value cannot be read: {error}") from None
    if len(parsed) > 1 or (parsed["value"] is text and "\n" in text):
        raise ConfigError(
            f"on the command line: {override!r} has several lines; give each key=value as an argument of its own, and "
            "a string with line breaks in quotes"
        )
    value = parsed["value"]
    if key == "parent":
        raise ConfigError(
            f"on the command line: {override}: a recipe's parent stands in its file; give {text} in place of the "
            "recipe, or write a recipe with this parent"
        )
    *sections, last = key.split(".")
    for section in sections:
        merged = merged.setdefault(section, {})
        if not isinstance(merged, dict):
            raise ConfigError(f"on the command line: {key} goes below {section}, which is a value and not a section")
    rest = [name for name in merged if name != "kind"]
    below_method = len(sections) > 1 and sections[0] == "method"
    if below_method and last == "kind" and rest and merged.get("kind", value) != value:
        raise ConfigError(
            f"on the command line: {override} would keep {', '.join(rest)} of {merged['kind']!r}; give the whole "
            f"table: '{'.'.join(sections)}={{kind = \"{value}\"}}'"
        )
    merged[last] = value


def _readable(error: ValidationError, path: str | Path, given: list[str]) -> str:
    """Every fault, below the place where it stands. ``given``: the keys of the command line."""
    places: dict[str, list[str]] = {"on the command line": [], str(path): []}
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        overridden = any(f"{key}.".startswith(f"{where}.") or where.startswith(f"{key}.") for key in given)
        lines = places["on the command line" if overridden else str(path)]
        if item["type"] == "extra_forbidden":
            lines += unknown_keys(Config, where, item["input"])
        elif item["type"] in ("dict_type", "model_type"):
            found = redact(item["input"], where)
            example = f"{where}.name={found}" if where == "method" else f"{where}.KEY=VALUE"
            lines.append(f"{where}: a table, found {found!r}; set its keys, as in {example}")
        else:
            lines.append(f"{where}: {item['msg']}, found {redact(item['input'], where)!r}")
    return "\n".join(f"{place}:\n  " + "\n  ".join(lines) for place, lines in places.items() if lines)

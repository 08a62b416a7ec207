"""The descriptions in schema.py: a configuration as a commented recipe, and lists of keys for documentation."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_ext.config.schema import LARGEST, Config, Section

WIDTH = 110  # of a comment
_TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "object": "table"}


class Key(NamedTuple):
    """One key of a section: its name, the values it takes, its default and its description."""

    name: str
    values: str
    default: Any
    description: str


def sections(schema: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, list[Key]]]:
    """Dotted name, description and keys of each section, in the order of the schema; "" is a recipe's top level."""
    properties = schema.model_json_schema()["properties"]
    below = {name: section for name, field in schema.model_fields.items() if (section := _section(field.annotation))}
    keys = [
        Key(name, _values(properties[name]), field.default, field.description or "")
        for name, field in schema.model_fields.items()
        if name not in below
    ]
    yield prefix, " ".join((schema.__doc__ or "").split()), keys
    for name, section in below.items():
        yield from sections(section, f"{prefix}.{name}".removeprefix("."))


def to_toml(config: Mapping[str, Any]) -> str:
    """``config`` as a recipe, each key below its description. TOML has no null: a key without a value is a comment."""
    lines = []
    for section, description, keys in sections():
        table: Any = config
        for name in section.split(".") if section else ():
            table = table[name]
        if section:
            lines += ["", *_comment(description), f"[{section}]"]
        for key in keys:
            if key.name != "method":  # a table of its own: the options are the method's
                lines += [*_comment(key.description), _line(key.name, table[key.name])]
    description = Config.model_fields["method"].description or ""
    lines += ["", *_comment(description), "[method]", *(_line(name, each) for name, each in config["method"].items())]
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value of a recipe as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_name(key)} = {toml_value(each)}' for key, each in value.items())}}}"
    return repr(value)


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _values(schema: Mapping[str, Any]) -> str:
    """The values that a key takes, from its JSON schema: ``integer, 0 to 1024``."""
    if "enum" in schema:
        return " or ".join(map(toml_value, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    bounds = [f">= {low:g}"] if low is not None else [f"> {above:g}"] if above is not None else []
    if high is not None and high < LARGEST:
        bounds.append(f"<= {high:g}")
    elif below is not None:
        bounds.append(f"< {below:g}")
    return " ".join([_TYPES[schema["type"]], ", ".join(bounds)]).strip()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")


def _line(name: str, value: Any) -> str:
    return f"# {name} is not set" if value is None else f"{name} = {toml_value(value)}"


def _name(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"

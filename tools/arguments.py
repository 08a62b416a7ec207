"""Command lines: what a tool cannot use is refused by its parser, before anything is done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    takes_overrides = False

    def error(self, message: str) -> NoReturn:
        if self.takes_overrides and message.startswith("unrecognized arguments"):
            message += "; keys of the recipe are set as section.key=value, such as train.steps=5"
        super().error(message)


def command_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of ``megatron-entropy name``; ``text`` is its module's docstring, examples and exit codes included."""
    return _Parser(
        prog=f"megatron-entropy {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_recipe(parser: argparse.ArgumentParser, *, example: str) -> None:
    """The two arguments of every tool that reads a recipe."""
    if isinstance(parser, _Parser):
        parser.takes_overrides = True
    parser.add_argument("recipe", help="a TOML file, or the name of a shipped recipe (megatron-entropy recipes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"for example {example}")


def number(*, above: float = 0.0, at_most: float = math.inf) -> Callable[[str], float]:
    """A finite number in ``(above, at_most]``."""
    expected = f"a number above {above:g}" + ("" if math.isinf(at_most) else f" and at most {at_most:g}")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value <= at_most):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
        return value

    return parse


def whole_number(at_least: int) -> Callable[[str], int]:
    """A whole number of at least ``at_least``, of those that a seed or a count may be."""

    def parse(text: str) -> int:
        if not text.strip("+").isdecimal() or not at_least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least {at_least}")
        return int(text)

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    """``1,2,4``."""
    return tuple(whole_number(1)(part) for part in text.split(","))


def output_file(text: str) -> Path:
    """A file that can be written, in a folder that is made if need be; what is in the file stays."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: NUL in its name
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error}") from None
    return path

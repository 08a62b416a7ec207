"""Samples files: the responses of one model to problems. evaluate writes them, what counts responses reads them.

JSON Lines, one response a line: ``set``, ``id``, ``sample``, ``text`` and, as far as they are known, ``response_ids``,
``length`` (tokens), ``truncated``, ``outcome``, ``extracted``, ``correct``. A line ``{"header": ...}`` says what the
responses depend on. A torn last line, of a process that was killed in the middle of it, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_ext.config.errors import ConfigError
from megatron_ext.files import first_fault, parse_json, read_lines

from .report.data import Record

EXAMPLE = '{"set": "aime24", "id": "7", "sample": 0, "text": "...", "correct": true}'


class SampleRow(Record):
    """One response."""

    set: str = ""
    id: str
    sample: int = 0
    text: str
    response_ids: list[int] | None = None
    length: int = 0
    truncated: bool = False
    outcome: str = ""
    correct: bool | None = None

    @property
    def problem(self) -> tuple[str, str]:
        return self.set, self.id

    @property
    def is_correct(self) -> bool | None:
        """None: the response was not scored."""
        return (self.outcome == "correct" if self.outcome else None) if self.correct is None else self.correct


class SampleLine(NamedTuple):
    """A line of a samples file: its number, counted from 1, the bytes of the file to its end, and its object.

    ``whole``: a line break ends it. The last line of a file that something else wrote may have none.
    """

    number: int
    end: int
    whole: bool
    content: dict[str, Any]

    @property
    def header(self) -> dict[str, Any] | None:
        """The header that the line is, None for a response."""
        found = self.content.get("header")
        return found if isinstance(found, dict) else None


def sample_lines(path: Path) -> Iterator[SampleLine]:
    """Header and responses as they are. Raises ConfigError for a file that cannot be read, and for another line."""
    end = 0
    try:
        for number, text in enumerate(read_lines(path), 1):
            end, whole = end + len(text), text.endswith(b"\n")
            try:
                content = parse_json(text)
            except ValueError as error:
                if not whole:
                    return
                raise damaged(path, number, str(error)) from None
            if not isinstance(content, dict):
                raise damaged(path, number, f"expected an object, found {type(content).__name__}")
            yield SampleLine(number, end, whole, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a samples file") from None


def read_samples(path: Path) -> Iterator[SampleRow]:
    """The responses, checked. Raises ConfigError as ``sample_lines``, and for one with a field that does not fit."""
    for line in sample_lines(path):
        if line.header is None:
            try:
                yield SampleRow.model_validate(line.content)
            except ValidationError as error:
                raise damaged(path, line.number, first_fault(error)) from None


def damaged(path: Path, number: int, fault: str) -> ConfigError:
    """What is wrong with a line."""
    return ConfigError(f"{path}, line {number}: {fault}; expected lines like {EXAMPLE}")

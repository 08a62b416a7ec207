"""How many of a model's responses to each problem are right: what filters by solve rate ask for.

A samples file is JSON Lines, one response a line, of which ``id`` and ``correct`` count. ``tools.evaluate`` writes it,
with a header before the responses, which is passed over.
"""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config.errors import ConfigError
from megatron_ext.files import parse_json, read_lines


@dataclass(frozen=True)
class Range:
    """``low..high`` right responses, both included; the end may be left open."""

    low: int
    high: float

    @classmethod
    def parse(cls, text: str) -> Range:
        found = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})?", text)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ArgumentTypeError(f"found {text!r}, expected LOW..HIGH, such as 1..7 of 8 responses, or 1..")
        return cls(int(found[1]), int(found[2]) if found[2] else math.inf)

    def __str__(self) -> str:
        return f"{self.low}..{'' if math.isinf(self.high) else self.high}"


@dataclass
class SolveCounts:
    """``id -> number`` of right responses and of all, over every file that was read."""

    correct: Counter[str] = field(default_factory=Counter)
    sampled: Counter[str] = field(default_factory=Counter)

    def verdict(self, problem_id: str, wanted: Range) -> tuple[str, str] | None:
        """Why a problem is left out, as reason and words; None: it stays."""
        correct, sampled = self.correct[problem_id], self.sampled[problem_id]
        if not sampled:
            return "no_samples", "the samples file has no response to it"
        words = f"{correct} of {sampled} responses are right, expected {wanted}"
        if correct < wanted.low:
            return "solved_too_rarely", words
        return ("solved_too_often", words) if correct > wanted.high else None


def read_samples(paths: Sequence[Path]) -> SolveCounts:
    """Raises ConfigError for a file that cannot be read and a line that is no response."""
    counts = SolveCounts()
    for path in paths:
        before, number = counts.sampled.total(), 0
        try:
            for line in read_lines(path):
                number += 1
                if line.strip():
                    _count(counts, parse_json(line))
        except OSError as error:
            raise ConfigError(f"--solved: cannot read {path}: {error.strerror}; give a samples file") from None
        except ValueError as error:
            raise ConfigError(
                f"--solved: {path}, line {number}: {error}; expected a response a line with "
                '"id" and "correct", as megatron-entropy evaluate writes them'
            ) from None
        if counts.sampled.total() == before:
            raise ConfigError(f"--solved: {path} has no responses")
    return counts


def _count(counts: SolveCounts, record: object) -> None:
    if isinstance(record, dict) and set(record) == {"header"}:
        return
    if not isinstance(record, dict) or "id" not in record or not isinstance(record.get("correct"), bool):
        raise ValueError(f"found {str(record)[:80]}")
    counts.sampled[str(record["id"])] += 1
    counts.correct[str(record["id"])] += record["correct"]

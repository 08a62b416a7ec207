"""How many of a model's responses to each problem are right: what filters by solve rate ask for."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config.errors import ConfigError

from ..samples import read_samples


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

    def doubts(self, wanted: Range) -> list[str]:
        """What makes ``wanted`` of these responses another filter than it looks."""
        most, found = max(self.sampled.values()), []
        if most <= wanted.high < math.inf:
            found.append(f"note: problems have at most {most} responses, so that none is solved too often by {wanted}")
        if fewer := sum(count < most for count in self.sampled.values()):
            found.append(f"note: {fewer} problems have fewer than {most} responses; was their evaluation stopped?")
        return found


def count_solved(paths: Sequence[Path]) -> SolveCounts:
    """Counts of samples files. Raises ConfigError for one that cannot be read, that is empty, or was not scored."""
    counts = SolveCounts()
    for path in paths:
        before = counts.sampled.total()
        for row in read_samples(path):
            if row.is_correct is None:
                raise ConfigError(f"--solved: {path}: a response to problem {row.id} was not scored; evaluate it")
            counts.sampled[row.id] += 1
            counts.correct[row.id] += row.is_correct
        if counts.sampled.total() == before:
            raise ConfigError(f"--solved: {path} has no responses")
    return counts

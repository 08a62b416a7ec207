"""What is left out of a set, why, and the first examples of each reason: nothing is left out in silence."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.types import Problem

NUM_EXAMPLES = 5
ANSWERS_OF_TRUE_FALSE = {"true", "false", "yes", "no", "correct", "incorrect"}
OPTIONS = re.compile(r"\(A\).*\(B\)|^\s*A[.)] .*^\s*B[.)] ", re.DOTALL | re.MULTILINE)
PROOF = re.compile(r"\bprove\b|\bshow that\b|证明", re.IGNORECASE)
QUESTION_TYPES = ("true-false", "choice", "proof")


@dataclass
class LeftOut:
    """Counts and first examples by reason, in the order in which reasons came up."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str, message: str) -> None:
        self.counts[reason] += 1
        listed = self.examples.setdefault(reason, [])
        if len(listed) < NUM_EXAMPLES:
            listed.append(f"{where}: {message}"[:400])

    def lines(self) -> list[str]:
        """For the user: a line a reason with its count, and its examples below."""
        found = []
        for reason, count in self.counts.items():
            found += [f"left out, {reason}: {count}", *(f"  {example}" for example in self.examples[reason])]
            found += [f"  ... and {count - NUM_EXAMPLES} more"] if count > NUM_EXAMPLES else []
        return found


class Seen:
    """Prompts by what they are without their white space; the texts themselves are not kept."""

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[str, str]] = {}

    def verdict(self, problem: Problem, where: str) -> tuple[str, str] | None:
        """As reason and words, when an earlier problem has the prompt. The first stays, as in training."""
        key = hashlib.blake2b(" ".join(problem.prompt.split()).encode(), digest_size=16).digest()
        if key not in self._first:
            self._first[key] = (where, problem.answer)
            return None
        first, answer = self._first[key]
        if answer == problem.answer:
            return "duplicate", f"the problem of {first}, with the same answer"
        return "conflicting", f"the problem of {first} with the answer {problem.answer[:60]!r}, there {answer[:60]!r}"


def question_type(problem: Problem) -> str:
    """One of QUESTION_TYPES, or ''. A rule of thumb by the words of the problem and the form of its answer."""
    answer = re.sub(r"\\(?:text|mathrm|textbf)|[{}.\s]", "", problem.answer).casefold()
    if answer in ANSWERS_OF_TRUE_FALSE:
        return "true-false"
    if problem.verifier == "choice" or OPTIONS.search(problem.prompt):
        return "choice"
    return "proof" if PROOF.search(problem.prompt) else ""


def histogram(lengths: Iterable[int]) -> dict[str, int]:
    """``{"<= 64": 3, "<= 128": 10}``: bins that double."""
    bins = Counter(max(16, 1 << max(0, length - 1).bit_length()) for length in lengths)
    return {f"<= {bound}": bins[bound] for bound in sorted(bins)}


def summary(values: list[int]) -> dict[str, Any]:
    """Smallest, median, largest and the histogram of lengths."""
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": ordered[len(ordered) // 2],
        "max": ordered[-1],
        "histogram": histogram(ordered),
    }

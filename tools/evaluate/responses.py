"""What is kept of a response once it is scored, and what its text says besides the answer.

*Words* are what white space separates. A response's **repeated share** is the share of its 4-grams of words that it had
before: ``1 - distinct / all``, 0 below four words. It has a **loop** when a block of 1 to 64 words stands at least four
times in a row, in all at least 32 words. **Reflective words** are those whose counts Entropy Advantage (arXiv
2506.14758, section 2: verify, check) and EntroPIC (arXiv 2511.15248, appendix D.6: wait, alternatively, let's
reconsider) take for a sign of reflection, in any inflection and letter case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GRAM = 4
LONGEST_BLOCK, LEAST_COPIES, LEAST_WORDS = 64, 4, 32
REFLECTIVE = {
    "verify": r"verif(?:y|ies|ied|ying|ication|ications)",
    "check": r"(?:double-?|re-?)?check(?:s|ed|ing)?",
    "wait": r"wait",
    "alternatively": r"alternatively",
    "reconsider": r"reconsider(?:s|ed|ing)?",
}
_PATTERNS = {name: re.compile(rf"\b{pattern}\b", re.IGNORECASE) for name, pattern in REFLECTIVE.items()}


@dataclass(frozen=True)
class Response:
    """One scored response without its text. ``length``: in tokens. ``outcome``: the verifier's."""

    length: int
    truncated: bool
    outcome: str
    extracted: str | None
    repeated: float
    loop: bool
    reflective: Mapping[str, int]

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Response:
        """From a line of a samples file. Raises KeyError and TypeError for any other object."""
        words = line["text"].split()
        return cls(
            length=int(line["length"]),
            truncated=bool(line["truncated"]),
            outcome=line["outcome"],
            extracted=line["extracted"],
            repeated=repeated_share(words),
            loop=has_loop(words),
            reflective=reflective_words(line["text"]),
        )


def repeated_share(words: list[str]) -> float:
    """The share of the 4-grams that stood before in the same response."""
    grams = list(zip(*(words[i:] for i in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def has_loop(words: list[str]) -> bool:
    """Whether a block of 1 to 64 words is repeated at once: four times or more, and 32 words or more."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words])
    for block in range(1, min(LONGEST_BLOCK, len(ids) // LEAST_COPIES) + 1):
        needed = max(LEAST_COPIES * block, LEAST_WORDS) - block  # matches in a row with the word one block before
        if _longest_run(ids[block:] == ids[:-block]) >= needed:
            return True
    return False


def reflective_words(text: str) -> dict[str, int]:
    """How often each word of REFLECTIVE stands in the text."""
    return {name: len(pattern.findall(text)) for name, pattern in _PATTERNS.items()}


def _longest_run(same: np.ndarray) -> int:
    """Of True in a row."""
    breaks = np.flatnonzero(np.concatenate(([True], ~same, [True])))
    return int(np.diff(breaks).max()) - 1

"""Training problems that are in an evaluation set, by 13-grams of normalised words.

A row overlaps with a problem when it holds all of the problem's 13-grams, or one of them that is no common phrase; with
a problem of fewer words when both are the same words. Common phrases ("where m and n are relatively prime positive
integers") are 13-grams of more than ``COMMON_ROWS`` rows, as in GPT-3's filter (arXiv 2005.14165, appendix C), or of
``COMMON_PROBLEMS`` problems. The verdict depends neither on the order of the rows nor on case, white space and signs.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

N = 13
COMMON_ROWS = 10
COMMON_PROBLEMS = 3
_HAN = "\u3040-\u30ff\u3400-\u9fff"  # a character is a word
WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")


@dataclass(frozen=True)
class Match:
    """``shared`` of the problem's ``total`` 13-grams are in the row; of short problems the whole text is one."""

    problem: str
    shared: int
    total: int
    text: str

    def __str__(self) -> str:
        return f"{self.shared} of {self.total} {N}-grams of {self.problem}: {self.text!r}"


def words(text: str) -> list[str]:
    """Letters and digits in lower case; LaTeX commands are words without their backslash."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(text: str) -> set[str]:
    """The distinct 13-grams; of a shorter text itself, marked as whole."""
    found = words(text)
    if len(found) < N:
        return {_whole(found)} if found else set()
    return {" ".join(found[start : start + N]) for start in range(len(found) - N + 1)}


class EvaluationSets:
    """Problems that must not be trained on, each with the name under which it is reported."""

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self._problems: list[tuple[str, int]] = []  # name, number of 13-grams
        self._of: dict[str, list[int]] = {}  # 13-gram -> numbers of problems
        known: set[frozenset[str]] = set()
        for name, text in problems:
            grams = frozenset(ngrams(text))
            if grams in known:
                continue  # one problem in two sets is no common phrase
            known.add(grams)
            for gram in sorted(grams):
                self._of.setdefault(gram, []).append(len(self._problems))
            self._problems.append((name, len(grams)))

    def matches(self, prompts: Sequence[str]) -> dict[int, Match]:
        """``number of a prompt -> match`` of those that overlap, with the problem of which they hold most."""
        found = {number: grams for number, text in enumerate(prompts) if (grams := self._known(text))}
        num_rows = Counter(gram for grams in found.values() for gram in grams)
        common = {
            gram for gram, count in num_rows.items() if count > COMMON_ROWS or len(self._of[gram]) >= COMMON_PROBLEMS
        }
        best = {number: self._best(grams, common) for number, grams in found.items()}
        return {number: match for number, match in best.items() if match is not None}

    def _known(self, text: str) -> set[str]:
        return {gram for gram in ngrams(text) if gram in self._of}

    def _best(self, grams: set[str], common: set[str]) -> Match | None:
        shared = Counter(problem for gram in grams for problem in self._of[gram])
        telling = {problem for gram in grams - common for problem in self._of[gram]}
        candidates = [
            problem for problem in shared if problem in telling or shared[problem] == self._problems[problem][1]
        ]
        if not candidates:
            return None
        problem = max(candidates, key=lambda each: (shared[each] / self._problems[each][1], -each))
        name, total = self._problems[problem]
        text = min(
            gram for gram in grams if problem in self._of[gram] and (gram not in common or problem not in telling)
        )
        return Match(name, shared[problem], total, text.strip())


def _whole(found: Sequence[str]) -> str:
    return " " + " ".join(found)  # no 13-gram begins so

"""Where pivotal words and reflective sentences are in a response, and the entropy there.

Pivotal words are those that Entropy Advantage (arXiv 2506.14758) names in section 2, "Pivotal Tokens"; its whole list
is not published. Reflective sentences hold a keyword of its section 2, "Reflective Actions" (verify, check), or of
EntroPIC (arXiv 2511.15248), Appendix D, on reflective phrases (wait, alternatively, reconsider).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .scored import Scored

PIVOTAL = ("because", "therefore", "thus", "however", "although", "first", "then", "suggest", "demonstrate", "recall")
REFLECTIVE = ("verify", "check", "wait", "alternatively", "reconsider")
PLACE = (
    "pivotal: arXiv 2506.14758, section 2 (Pivotal Tokens); reflective: its section 2 (Reflective Actions) and arXiv "
    "2511.15248, Appendix D (reflective phrases)"
)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*|[.!?\n]+")


@dataclass
class Split:
    """Entropies in nats of those that are meant and of the others, each with its problem, and what was found."""

    meant: list[tuple[tuple[str, str], float]] = field(default_factory=list)
    others: list[tuple[tuple[str, str], float]] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)

    def means(self) -> tuple[float, float]:
        return float(np.mean([v for _, v in self.meant])), float(np.mean([v for _, v in self.others]))

    def by_problem(self) -> tuple[list[float], list[float]]:
        """The two means of each problem that has both, in the same order."""
        meant, others = _by_problem(self.meant), _by_problem(self.others)
        both = [key for key in meant if key in others]
        return [meant[key] for key in both], [others[key] for key in both]


def pivotal(responses: Sequence[Scored], words: Sequence[str]) -> Split:
    """Tokens with which a pivotal word begins, against all other tokens."""
    found = Split(words=dict.fromkeys(words, 0))
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    for response in responses:
        ends = np.cumsum([len(text) for text in response.texts])
        text = "".join(response.texts)
        begins = set()
        for match in pattern.finditer(text):
            begins.add(int(np.searchsorted(ends, match.start(), side="right")))
            found.words[match.group().lower()] += 1
        for place, value in enumerate(response.entropy):
            (found.meant if place in begins else found.others).append((response.problem, float(value)))
    return found


def reflective(responses: Sequence[Scored], words: Sequence[str]) -> Split:
    """The mean entropy of sentences with a keyword (or a word that begins with it), against other sentences."""
    found = Split(words=dict.fromkeys(words, 0))
    pattern = re.compile(rf"\b({'|'.join(re.escape(word) for word in words)})", re.IGNORECASE)
    for response in responses:
        for sentence, entropy in sentences(response):
            keywords = {match.group(1).lower() for match in pattern.finditer(sentence)}
            for word in keywords:
                found.words[word] += 1
            (found.meant if keywords else found.others).append((response.problem, entropy))
    return found


def sentences(response: Scored) -> Iterator[tuple[str, float]]:
    """Each sentence with a letter or digit, and the mean entropy of the tokens that begin in it."""
    starts = np.cumsum([0, *(len(text) for text in response.texts)])[:-1]
    text = "".join(response.texts)
    for match in _SENTENCE.finditer(text):
        inside = (starts >= match.start()) & (starts < match.end())
        if inside.any() and any(letter.isalnum() for letter in match.group()):
            yield match.group(), float(response.entropy[inside].mean())


def _by_problem(pairs: Sequence[tuple[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}

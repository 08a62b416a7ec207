"""The verdict on an answer that is the letter of an option."""

from __future__ import annotations

import re

from megatron_ext.rollout.rewards.extraction import TEXT
from megatron_ext.rollout.rewards.outcome import Outcome


def score_choice(extracted: str, gold: str, numbers: tuple[int, ...]) -> Outcome:
    del numbers
    right, found = letter(gold), letter(extracted)
    if right is None:
        return Outcome.BAD_GOLD
    if found is None:
        return Outcome.UNPARSABLE
    return Outcome.CORRECT if found == right else Outcome.WRONG


def letter(text: str) -> str | None:
    """The option that ``text`` names, as a capital: ``B`` of ``(B)``, ``\\text{B}``, ``b``, ``B. text``, ``option B``.

    None for no option or several (``A or B``, ``A. B``).
    """
    bare = re.sub(rf"{TEXT}|\\(?:left|right)(?![a-zA-Z])|\\[ ,;:!]|[$*~]", " ", text)
    bare = re.sub(r"[{}]", "", bare).strip()
    bare = re.sub(r"^(?:the\s+)?(?:option|choice)\b\s*", "", bare, flags=re.IGNORECASE)
    found = re.fullmatch(r"(?:\(\s*([a-zA-Z])\s*\)|\[\s*([a-zA-Z])\s*\]|([a-zA-Z]))([.:)]?)(|\s.*)", bare, re.DOTALL)
    if found is None:
        return None
    named, rest = found[1] or found[2] or found[3], found[5].strip()
    bracketed = found[3] is None or found[4]
    other = re.match(r"[,;/&|+]|(?i:and|or)\b|[(\[]?\s*[A-Z]\s*[)\].:]*$", rest)
    if rest and (named.islower() or not bracketed or other):
        return None
    return named.upper()

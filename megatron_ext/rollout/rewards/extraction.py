"""Where a response gives its answer: the last box, or the last answer line, after its reasoning."""

from __future__ import annotations

import re
from collections.abc import Callable

MAX_ANSWER_CHARS = 1000
TEXT = r"\\(?:text(?:normal|bf|it|rm|sf|tt)?|mbox|math(?:rm|bf|it|sf|tt)|boldsymbol)(?![a-zA-Z])"  # LaTeX's dresses


def extract(response: str, answer_format: str = "boxed", *, in_thought: bool = False) -> str | None:
    """The answer that a response gives after its reasoning, or None. ``answer_format`` is a key of ``FORMATS``.

    Reasoning ends at the last ``</think>``; what follows an unclosed ``<think>`` is reasoning too, also where the
    prompt has opened it (``in_thought``).
    """
    response = "<think>" * in_thought + response
    return FORMATS[answer_format](response.rpartition("</think>")[2].partition("<think>")[0])


def as_response(answer: str, answer_format: str = "boxed") -> str:
    """The shortest response whose extracted answer is ``answer``."""
    return rf"\boxed{{{answer}}}" if answer_format == "boxed" else f"Answer: {' '.join(answer.split())}"


def _last_box(said: str) -> str | None:
    """The content of the last ``\\boxed{}``. Of nested boxes the innermost counts, one that is never closed (a response
    cut short) is no answer."""
    boxes = list(re.finditer(r"\\boxed\s*\{", said))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(said, start):  # \{ and \} do not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return said[start : token.start()].strip() or None
    return None


def _answer_line(said: str) -> str | None:
    """What follows ``Answer:`` in the last line that begins so, without Markdown's signs, ``$`` and a full stop.

    An answer may stand on the line below. A box in it counts alone, one that is never closed is no answer.
    """
    heads = list(re.finditer(r"^[ \t>#*_-]*answer[ \t*_]*:", said, re.IGNORECASE | re.MULTILINE))
    behind = said[heads[-1].end() :].lstrip(" \t\r\n*_") if heads else ""
    display = re.match(r"(?:\\\[.*?\\\]|\$\$.*?\$\$)(?=[ \t*_.]*(?:\n|$))", behind, re.DOTALL)  # of several lines
    line = " ".join(display[0].split()) if display else behind.partition("\n")[0]
    if "\\boxed" in line:
        return _last_box(line)
    line = _without_full_stop(line.rstrip(" \t\r*_"))
    formula = re.fullmatch(r"(\$\$?)([^$]+)\1|\\\((.+)\\\)|\\\[(.+)\\\]", line)
    return _without_full_stop((formula[2] or formula[3] or formula[4]).strip() if formula else line) or None


def _without_full_stop(line: str) -> str:
    return re.sub(r"(?<!\.)\.$", "", line).rstrip(" \t*_")


FORMATS: dict[str, Callable[[str], str | None]] = {"boxed": _last_box, "answer_line": _answer_line}

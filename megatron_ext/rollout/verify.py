"""Judge one answer: the last box of a response against the gold answer. No torch, no package import.

``RewardPool`` (rollout/rewards.py) runs this file as a script, so that an answer that never returns, eats the
memory or aborts the interpreter costs one killable process and nothing else. Nothing here times itself out:
math-verify's own timeout is ``signal.alarm``, which works in the main thread only and which a single long
operation in C defeats.

Verdicts are those of math-verify 0.9 on ``\\boxed{answer}`` against ``\\boxed{gold}`` (a bare LaTeX gold is
often misread), except that an equation between numbers must hold: math-verify keeps the last side only and
takes ``1=2=3=4`` for 4. A countdown's expression, which is plain arithmetic, is computed exactly instead.
"""

from __future__ import annotations

import ast
import json
import logging
import operator
import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

MAX_ANSWER_CHARS = 1000
MAX_WORKER_BYTES = 2 << 30  # address space: a huge number fails alone instead of taking the node's memory
READY = "ready"
# gmpy2 computes (2^31)! in one C call and aborts the process on a number too large; python's integers do not
WORKER_ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"}


class Outcome(StrEnum):
    """Why a response has its reward. Everything but ``CORRECT`` earns the wrong reward."""

    CORRECT = "correct"
    WRONG = "wrong"
    WRONG_NUMBERS = "wrong_numbers"  # countdown: not exactly the given numbers
    CONTRADICTION = "contradiction"  # the boxed equation is false: 3=4
    NO_ANSWER = "no_answer"  # no box after the reasoning, or it is empty or never closed
    TOO_LONG = "too_long"  # more than MAX_ANSWER_CHARS in the box
    UNPARSABLE = "unparsable"
    BAD_GOLD = "bad_gold"  # the gold answer itself cannot be read
    TIMEOUT = "timeout"  # the worker was killed at the deadline
    CRASHED = "crashed"  # the worker died of this answer, twice


class Verdict(NamedTuple):
    correct: bool
    outcome: Outcome
    extracted: str | None


def judge(response: str, answer: str, verifier: str = "math", numbers: tuple[int, ...] = ()) -> Verdict:
    """The verdict on a whole response. May never return: see the module's docstring."""
    extracted = extract(response)
    outcome = Outcome.NO_ANSWER if extracted is None else judge_answer(extracted, answer, verifier, numbers)
    return Verdict(outcome is Outcome.CORRECT, outcome, extracted)


def judge_answer(extracted: str, answer: str, verifier: str, numbers: tuple[int, ...]) -> Outcome:
    """The outcome for the content of a box. ``verifier`` is a key of ``VERIFIERS``."""
    if len(extracted) > MAX_ANSWER_CHARS:
        return Outcome.TOO_LONG
    return VERIFIERS[verifier](extracted, answer, numbers)


def extract(response: str) -> str | None:
    """The content of the last ``\\boxed{}`` after the reasoning, or None.

    Reasoning ends at the last ``</think>``; what follows an unclosed ``<think>`` is reasoning too. Of nested
    boxes the innermost counts. A last box that is never closed (a response cut short) is no answer.
    """
    said = response.rpartition("</think>")[2].partition("<think>")[0]
    boxes = list(re.finditer(r"\\boxed\s*\{", said))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(said, start):  # \{ and \} do not count
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return said[start : token.start()].strip() or None
    return None


def _judge_math(extracted: str, gold: str, numbers: tuple[int, ...]) -> Outcome:
    del numbers
    right, found = _parse(gold), _parse(extracted)
    if right is None:
        return Outcome.BAD_GOLD
    if found is None:
        return Outcome.UNPARSABLE
    chains = list(_chains(found))
    if _top_level_equals(extracted) > 1 and not chains:
        return Outcome.UNPARSABLE  # math-verify could not read the chain and took what stands after its last sign
    if not all(_holds(sides) for sides in chains):
        return Outcome.CONTRADICTION
    return Outcome.CORRECT if _equal(right, found) else Outcome.WRONG


def _judge_countdown(extracted: str, target: str, numbers: tuple[int, ...]) -> Outcome:
    tree = _arithmetic(extracted, target)
    if tree is None:
        return Outcome.UNPARSABLE
    used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    if Counter(used) != Counter(numbers):
        return Outcome.WRONG_NUMBERS
    try:
        wanted = Fraction(target)
    except (ValueError, ZeroDivisionError):  # a target that is not a plain number: for math-verify
        return _judge_math(ast.unparse(tree), target, ())
    try:
        return Outcome.CORRECT if _value(tree.body) == wanted else Outcome.WRONG
    except ZeroDivisionError:
        return Outcome.WRONG
    except RecursionError:  # a thousand signs
        return Outcome.UNPARSABLE


OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.UAdd: operator.add, ast.USub: operator.sub},  # of 0 and the operand
}
VERIFIERS = {"math": _judge_math, "countdown": _judge_countdown}


def _parse(answer: str) -> Any | None:
    """The SymPy object that math-verify reads in ``\\boxed{answer}``, or None."""
    from math_verify import LatexExtractionConfig, parse

    if len(answer) > MAX_ANSWER_CHARS:
        return None
    inner = extract(answer) or answer.strip()
    display = re.fullmatch(r"\\\[(.*)\\\]|\$\$(.*)\$\$", inner, re.DOTALL)  # math-verify reads $ and \( inside a box
    if display:
        inner = display[1] or display[2] or ""
    only_the_box = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found = parse(
        rf"\boxed{{{inner}}}",
        [only_the_box],
        fallback_mode="no_fallback",  # no comparison of strings: what cannot be read is reported
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]  # None is documented, only the annotation says int
    )
    return found[0] if found else None


def _equal(gold: Any, found: Any) -> bool:
    from math_verify import verify

    return verify(gold, found, timeout_seconds=None)


def _chains(expression: Any) -> Iterator[list[Any]]:
    """The sides of every chain ``a = b = c`` in an answer, which may be a list of equations."""
    from sympy import And, Eq, FiniteSet, Tuple

    if isinstance(expression, Eq):
        yield list(expression.args)
    elif isinstance(expression, And) and all(isinstance(relation, Eq) for relation in expression.args):
        yield [side for relation in expression.args for side in relation.args]
    elif isinstance(expression, FiniteSet | Tuple):
        for element in expression.args:
            yield from _chains(element)


def _holds(sides: list[Any]) -> bool:
    """Whether the sides without a name (``x``, ``f(2)``) are equal to one another."""
    from sympy.core.function import AppliedUndef

    values = [side for side in sides if not side.free_symbols and not side.atoms(AppliedUndef)]
    return all(_equal(first, second) for first, second in pairwise(values))


def _top_level_equals(text: str) -> int:
    """Equality signs outside braces: not the one of ``\\sum_{i=1}``, ``\\neq``, ``<=``, ``>=`` or ``!=``."""
    depth = count = 0
    for token in re.finditer(r"\\[{}]|[{}]|(?<![<>!\\])=", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        count += token[0] == "=" and depth == 0
    return count


def _arithmetic(text: str, target: str) -> ast.Expression | None:
    """Integers joined by ``+ - * /`` (or their LaTeX) and brackets, optionally ``= target``, or None.

    Every operator must be written: ``2(3)``, ``2 3``, ``2^3`` and ``1.5`` are None.
    """
    text, _, claim = text.partition("=")
    if claim and claim.strip() != target.strip():
        return None
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ()]|\$", " ", text)
    text = re.sub(r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|[×·]", "*", text)
    text = re.sub(r"\\div(?![a-zA-Z])|÷", "/", text).replace("−", "-")
    fraction, count = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), 1
    while count:  # from the innermost outwards
        text, count = fraction.subn(r"((\1)/(\2))", text)
    text = " ".join(text.split())
    if not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: too many brackets
        return None
    operators = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.UAdd | ast.USub
    allowed = ast.Expression | ast.BinOp | ast.UnaryOp | ast.Constant | operators
    return tree if all(isinstance(node, allowed) for node in ast.walk(tree)) else None


def _value(node: ast.expr) -> Fraction:
    """The exact value of a tree that ``_arithmetic`` accepted: a hundred times faster than math-verify's."""
    if isinstance(node, ast.UnaryOp):
        return OPERATORS[type(node.op)](Fraction(0), _value(node.operand))
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    return Fraction(node.value)


def main() -> None:
    """Answer requests from standard input, one JSON line each, with one outcome a line.

    ``argv[1]``: seconds after which a process that nobody killed (its parent is dead) ends itself.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # parsers print: their words must not reach the replies
    for notice in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # a scheduler sends them to all:
        signal.signal(notice, signal.SIG_IGN)  # they are for the trainer, which closes the pool when it ends
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_WORKER_BYTES if hard == resource.RLIM_INFINITY else min(hard, MAX_WORKER_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    logging.disable(logging.WARNING)  # math-verify warns that its timeouts are off
    if not judge(r"\boxed{x^2+2x+1}", "(x+1)^2").correct:  # imports, and builds tables, before any deadline runs
        raise SystemExit("the verifier does not know that x^2+2x+1 is (x+1)^2")
    print(READY, file=replies)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        extracted, answer, verifier, numbers = json.loads(line)
        outcome = judge_answer(extracted, answer, verifier, tuple(numbers))
        signal.alarm(0)
        print(outcome, file=replies)


if __name__ == "__main__":
    main()

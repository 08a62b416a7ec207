"""The verdict on a countdown: an expression of the given numbers, each used once, that has the target's value.

It is plain arithmetic and computed exactly, a hundred times faster than math-verify would.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from megatron_ext.rollout.rewards.math_answer import score_math
from megatron_ext.rollout.rewards.outcome import Outcome

OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.UAdd: operator.add, ast.USub: operator.sub},  # of 0 and the operand
}


def score_countdown(extracted: str, target: str, numbers: tuple[int, ...]) -> Outcome:
    tree = _arithmetic(extracted, target)
    if tree is None:
        return Outcome.UNPARSABLE
    used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    if Counter(used) != Counter(numbers):
        return Outcome.WRONG_NUMBERS
    try:
        wanted = Fraction(target)
    except (ValueError, ZeroDivisionError):  # a target that is not a plain number: for math-verify
        return score_math(ast.unparse(tree), target, ())
    try:
        return Outcome.CORRECT if _value(tree.body) == wanted else Outcome.WRONG
    except ZeroDivisionError:
        return Outcome.WRONG
    except RecursionError:  # a thousand signs
        return Outcome.UNPARSABLE


def exact_value(text: str) -> Fraction | None:
    """The value of integers joined by ``+ - * /`` and brackets; None for anything else or longer than 60 characters."""
    tree = _arithmetic(text, "") if len(text) <= 60 else None
    try:
        return None if tree is None else _value(tree.body)
    except ZeroDivisionError:
        return None


def _arithmetic(text: str, target: str) -> ast.Expression | None:
    """Integers joined by ``+ - * /`` (or their LaTeX) and brackets, optionally ``= target``, or None.

    Every operator must be written: ``2(3)``, ``2 3``, ``2^3`` and ``1.5`` are None.
    """
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[,;:! ()]|\$", " ", text)
    text, _, claim = text.strip().removesuffix(".").partition("=")
    if claim and claim.strip() != target.strip():
        return None
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

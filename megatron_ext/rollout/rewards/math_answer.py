"""The verdict on an answer of mathematics, by math-verify, made stricter.

Verdicts are those of math-verify 0.9 on ``\\boxed{answer}`` against ``\\boxed{gold}`` (a bare LaTeX gold is
often misread), but where it would reward what a teacher would not:

- what it drops in silence must not be there: approximations (``4\\approx 5``), dots, a box in the box, and behind
  a number anything but one unit (``4\\text{ or 5}``, ``4\\text{ hours }5\\text{ minutes}``, ``4\\text{ million}``);
  a base (``100_2``) only where the gold has the same one;
- an equation between numbers must hold. Against a gold that is no equation, each side is a name (``x``, ``f(2)``,
  ``AB``) or equal to the gold: ``x=4`` and ``2+2=4`` are 4, ``x+1=4`` and ``1=2=3=4`` are not. Chains are compared
  side by side, equations without a real solution by their two sides;
- one value is one value: not a list that repeats it, not the rows or columns of a matrix. A tuple has the gold's
  length and order, by name where x, y and z are named; only a gold that is a set or a bare list has no order;
- decimals agree to six places, below one to five digits; exact numbers exactly, ``2^{-100}`` is not ``3^{-100}``;
- a word (three letters and more, or in ``\\text``) is spelt as the gold is: ``cba`` is not ``abc``.

A gold with a part that math-verify drops is right only as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from megatron_ext.rollout.rewards.extraction import MAX_ANSWER_CHARS, TEXT, extract
from megatron_ext.rollout.rewards.outcome import Outcome

POWER = r"\^(?:-?\d|\{-?\d\}|\{?\\circ\}?)|\{\^\d\}"
SHORT_UNITS = ("cm", "mm", "km", "kg", "ft", "lb", "hr", "dm", "in")
NOT_A_UNIT = re.compile(
    r"\b(?:and|or|not|but|by|plus|minus|times|over|more|less|most|least|about|(?:hundred|thousand|[mbtr]+illion|dozen|"
    r"third|fourth|fifth|tenth|hundredth|thousandth|cube)s?|squared|cubed|half|halves|prime|pie|factorial)\b",
    re.IGNORECASE,
)


def score_math(extracted: str, gold: str, numbers: tuple[int, ...]) -> Outcome:
    del numbers
    extracted, gold = (re.sub(r"~(?!\s*=)", " ", text) for text in (extracted, gold))  # LaTeX's space: \mathrm{~cm}
    right = _parse(gold)
    if right is None:
        return Outcome.BAD_GOLD
    if _has_dropped_part(gold):
        return Outcome.CORRECT if extracted.split() == gold.split() else Outcome.WRONG
    dropped = _has_dropped_part(extracted) or _bases(extracted) not in ([], _bases(gold))
    found = None if dropped else _parse(extracted)
    if found is None:
        return Outcome.UNPARSABLE
    try:
        return _compare(right, found, gold, extracted)
    except Exception:  # SymPy raises of every kind on what it cannot compute; math-verify takes it for unequal, too
        return Outcome.WRONG


def _compare(right: Any, found: Any, gold: str, extracted: str) -> Outcome:
    """The outcome for two parsed answers and their texts."""
    chains = list(_chains(found))
    if _top_level_equals(extracted) > 1 and not chains:
        return Outcome.UNPARSABLE  # math-verify could not read the chain and took what stands after its last sign
    if not all(_holds(sides) for sides in chains):
        return Outcome.CONTRADICTION
    word, said = _word(gold, 2 if "\\" in gold else 3), _word(extracted, 1)
    correct = word == said if word and said else _answers(right, found)
    return Outcome.CORRECT if correct else Outcome.WRONG


def _parse(answer: str) -> Any | None:
    """The SymPy object that math-verify reads in ``\\boxed{answer}``, or None."""
    from math_verify import LatexExtractionConfig, parse

    if len(answer) > MAX_ANSWER_CHARS:
        return None
    inner = extract(answer) or answer.strip()
    display = re.fullmatch(r"\\\[(.*)\\\]|\$\$(.*)\$\$", inner, re.DOTALL)  # math-verify reads $ and \( inside a box
    if display:
        inner = display[1] or display[2] or ""
    inner = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))", "", inner)  # behind x= math-verify takes 1{,}000 for a list
    only_the_box = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    if re.search(r"(?<![a-zA-Z\\])[a-zA-Z]{1,2}$", inner) and not inner.endswith(SHORT_UNITS):
        no_units = replace(only_the_box.normalization_config, units=False)  # 4t is no 4 (tons)
        only_the_box = replace(only_the_box, normalization_config=no_units)
    found = parse(
        rf"\boxed{{{inner}}}",
        [only_the_box],
        fallback_mode="no_fallback",  # no comparison of strings: what cannot be read is reported
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]  # None is documented, only the annotation says int
    )
    return found[0] if found and not isinstance(found[0], list) else None  # a list: the rows of a matrix


def _answers(gold: Any, found: Any) -> bool:
    """Whether ``found`` answers a question whose answer is ``gold``."""
    from latex2sympy2_extended.logic import And
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Set, Tuple

    gold, found = _point(gold), _point(found)
    gold_chains, chain = list(_chains(gold)), _sides(found)
    if not gold_chains:
        found = _value_of(found)
        if isinstance(found, Set) and not isinstance(gold, Set | Tuple | And) and not gold.is_Relational:
            elements = _as_written(found) if isinstance(found, FiniteSet) else []
            found = elements[0] if len(elements) == 1 else None
        if found is None:
            return False
    elif (gold_sides := _sides(gold)) and chain:
        return _same_chain(gold_sides, chain)
    return _equal(gold, found)


def _same_chain(gold: list[Any], sides: list[Any]) -> bool:
    """Two equations ``a = b``, or chains of them, given by their sides."""
    from sympy import Eq

    if len(gold) == len(sides) == 2:
        return _same_equation(Eq(*gold, evaluate=False), Eq(*sides, evaluate=False))
    if len(gold) == len(sides):
        return all(_equal(*pair) for pair in zip(gold, sides, strict=True))
    ends = _equal(gold[0], sides[0]) and _equal(gold[-1], sides[-1])
    return ends and all(_is_name(side) or _equal(gold[-1], side) for side in sides[1:])


def _same_equation(gold: Any, found: Any) -> bool:
    """The same sides up to a factor, or the same real solutions where there are any.

    math-verify compares these solutions alone, and so finds all equations alike that have none.
    """
    from sympy import simplify, solve

    first, second = (simplify((equation.lhs - equation.rhs).doit()) for equation in (gold, found))
    if first == 0 or second == 0:
        return first == second
    factor = simplify(first / second)
    if factor.is_number and factor.is_finite and _precise(gold, found):
        return True
    return _equal(gold, found) and bool(solve(gold, gold.free_symbols))


def _equal(gold: Any, found: Any) -> bool:
    from math_verify import verify

    return verify(gold, found, timeout_seconds=None) and _precise(gold, found)


def _precise(gold: Any, found: Any) -> bool:
    """Whether numbers that agree to six decimals do so in their digits too, where six decimals are too few."""
    from sympy import Eq, Expr, FiniteSet, Float, Interval, MatrixBase, Rational, Tuple, simplify

    if isinstance(gold, Eq) and (not isinstance(found, Eq) or gold.lhs == found.lhs):
        return _precise(gold.rhs, found.rhs if isinstance(found, Eq) else found)
    if isinstance(gold, MatrixBase) and isinstance(found, MatrixBase):
        return all(map(_precise, gold.flat(), found.flat()))
    if isinstance(gold, FiniteSet | Tuple) and isinstance(found, FiniteSet | Tuple):
        return all(any(_equal(element, other) for other in found.args) for element in gold.args)
    if isinstance(gold, Interval) and isinstance(found, Interval):
        return _precise(gold.start, found.start) and _precise(gold.end, found.end)
    if not isinstance(gold, Expr) or not isinstance(found, Expr):
        return True
    symbols = sorted(gold.free_symbols | found.free_symbols, key=str)
    point: Any = {symbol: Rational(2 * i + 3, 7 * i + 11) for i, symbol in enumerate(symbols)}  # any will do
    first, second = (expression.doit().subs(point) for expression in (gold, found))
    size, difference = max(abs(first.evalf(50)), abs(second.evalf(50))), abs((first - second).evalf(50))
    if not size.is_number or size >= 1:  # from one on six decimals are six digits
        return True
    digits = 5 if first.has(Float) or second.has(Float) else 40
    return bool(difference <= size * Rational(1, 10**digits)) or simplify(gold - found) == 0


def _sides(expression: Any) -> list[Any]:
    """``a, b, c`` of an equation ``a = b = c``, in this order; of anything else none."""
    from latex2sympy2_extended.logic import And
    from sympy import Eq

    if isinstance(expression, Eq):
        return list(expression.args)
    if isinstance(expression, And) and all(isinstance(relation, Eq) for relation in expression.args):
        relations = _as_written(expression)
        return [relations[0].lhs, *(relation.rhs for relation in relations)]
    return []


def _as_written(expression: Any) -> list[Any]:
    """The parts of latex2sympy's sets and conjunctions, whose ``args`` are sorted, in their order."""
    return list(expression._unsorted_args)


def _chains(expression: Any) -> Iterator[list[Any]]:
    """The sides of every equation in an answer, which may be a list of them."""
    from sympy import FiniteSet, Tuple

    if sides := _sides(expression):
        yield sides
    elif isinstance(expression, FiniteSet | Tuple):
        for element in expression.args:
            yield from _chains(element)


def _point(expression: Any) -> Any:
    """``(3, -2)`` of ``(x, y) = (3, -2)`` and of ``(y, x) = (-2, 3)``; anything else as it is."""
    from sympy import Interval, Tuple

    sides = _sides(expression)
    names, values = sides if len(sides) == 2 else (None, None)
    if isinstance(values, Interval) and values.left_open and values.right_open:
        values = Tuple(values.start, values.end)  # a pair in rising order is read as an interval
    if not isinstance(names, Tuple) or not isinstance(values, Tuple) or len(names) != len(values):
        return expression
    if len(set(names)) < len(names) or not all(map(_is_name, names)):
        return expression
    return Tuple(*_in_order([str(name) for name in names], values.args))


def _in_order(names: Sequence[str], values: Sequence[Any]) -> Sequence[Any]:
    """The values as written, or by name where these are different ones of x, y and z."""
    if len(set(names)) < len(names) or not set(names) <= {"x", "y", "z"}:
        return values
    return [values[i] for i in sorted(range(len(names)), key=names.__getitem__)]


def _value_of(expression: Any) -> Any | None:
    """An answer without the names before its values: 4 of ``x = 8/2 = 4``. None if the other sides differ."""
    from latex2sympy2_extended.sets import FiniteSet
    from sympy import Tuple

    if isinstance(expression, FiniteSet | Tuple) and any(True for _ in _chains(expression)):
        elements = _as_written(expression) if isinstance(expression, FiniteSet) else expression.args
        names = [str(next(iter(_sides(element)), "")) for element in elements]
        values = [_value_of(element) for element in _in_order(names, elements)]
        return None if None in values else type(expression)(*values)
    sides = _sides(expression)
    if not sides:
        return expression
    said = [side for side in sides if not _is_name(side)] or sides[-1:]
    return said[-1] if all(_equal(said[-1], side) for side in said) else None


def _is_name(side: Any) -> bool:
    """``x``, ``S_2``, ``f(2)`` or letters side by side, as of the segment ``AB``."""
    from sympy import Symbol
    from sympy.core.function import AppliedUndef

    if isinstance(side, Symbol):
        return not re.search(r"\d", side.name.partition("_")[0])  # \mathbf{5} is read as a symbol
    if side.is_Mul:
        names = all(isinstance(factor, Symbol) and _is_name(factor) for factor in side.args)
        return names and len(set(side.args)) == len(side.args)
    return isinstance(side, AppliedUndef)


def _holds(sides: list[Any]) -> bool:
    """Whether the sides without a name (``x``, ``f(2)``) are equal to one another."""
    from sympy.core.function import AppliedUndef

    values = [side for side in sides if not side.free_symbols and not side.atoms(AppliedUndef)]
    return all(_equal(first, second) for first, second in pairwise(values))


def _has_dropped_part(text: str) -> bool:
    """Whether ``text`` holds what math-verify would leave out without a word, other than one unit at its end.

    ``\\text{ or }`` and ``\\text{ and }`` are the commas of a list to math-verify: its elements are looked at.
    """
    elements = re.split(rf"{TEXT}\s*\{{\s*(?:or|and)\s*\}}", text)
    if len(elements) > 1:
        return any(map(_has_dropped_part, elements))
    if re.search(r"\\approx|≈|~\s*=|\\ldots|\\fbox", text):
        return True
    tail = re.search(
        rf"(?<=\S)\s*{TEXT}\s*\{{.*\}}({POWER})?$|(?<=[\d}}\s])[a-zA-Z][a-zA-Z .]*$", text.strip(), re.DOTALL
    )
    if tail is None:
        return False
    words = re.sub(rf"{TEXT}|\\[ ,;:!]|\\cdot|{POWER}|[{{}}]", " ", tail[0])
    return bool(NOT_A_UNIT.search(words) or re.search(r"[\d,;:=()+*<>|&!?~\[\]\\]", words))


def _bases(text: str) -> list[str]:
    """The subscripts of numbers."""
    return [base.strip("{} ") for base in re.findall(r"\d\s*_\s*(\{[^{}]*\}|.)", text)]


def _word(text: str, shortest: int) -> str | None:
    """The letters of a text that is a word, whatever its dress; else None."""
    bare = re.sub(rf"{TEXT}|\\[ ,;:!]|[\s{{}}$.]", "", text)
    return bare.casefold() if re.fullmatch(rf"[^\W\d_]{{{shortest},}}", bare) else None


def _top_level_equals(text: str) -> int:
    """Equality signs outside braces: not the one of ``\\sum_{i=1}``, ``\\neq``, ``<=``, ``>=`` or ``!=``."""
    depth = count = 0
    for token in re.finditer(r"\\[{}]|[{}]|(?<![<>!\\])=", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        count += token[0] == "=" and depth == 0
    return count

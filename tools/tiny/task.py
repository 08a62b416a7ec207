"""The smallest task worth reinforcement learning: a character-level lab that trains on two CPU cores.

Two families of verifiable problems. *Countdown* (most of the data): ``9 5 1 > 44?`` asks for an expression
that uses each number exactly once and equals the target, ``\\boxed{9*5-1}``. *Arithmetic*: ``12-7*3=?`` asks
for a number, ``\\boxed{-9}`` or ``\\boxed{5/4}``. Every response token of a countdown is a decision (which
number, which operator), so the policy's entropy sits where the reward is decided.

    python -m tools.tiny.task --out recipes/tiny/data --seed 0
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path

from megatron_ext.types import Problem

LARGEST_NUMBER = 12
LARGEST_TARGET = 100
COUNTDOWN_SHARE = 0.84
FRACTION_SHARE = 0.3  # of the arithmetic problems
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str) -> Fraction:
    """The exact value of integers joined by ``+ - * /`` and parentheses.

    Raises ``ValueError`` for anything else, ``ZeroDivisionError`` for a division by zero.
    """
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        raise ValueError(f"not an arithmetic expression: {expression!r}") from None
    return _value(tree.body)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"only integers, + - * / and parentheses are arithmetic, found {ast.unparse(node)!r}")


def is_right(problem: Problem, response: str) -> bool:
    """Whether the response's last box answers the problem. Exact, and only for this task's syntax."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", response)
    if not boxed:
        return False
    try:
        right = evaluate(boxed[-1]) == Fraction(problem.answer)
    except (ValueError, ZeroDivisionError):
        return False
    used = sorted(int(number) for number in re.findall(r"\d+", boxed[-1]))
    return right and (problem.verifier != "countdown" or used == sorted(problem.numbers))


def expressions(numbers: tuple[int, ...]) -> list[str]:
    """Every expression over three numbers: no brackets, or brackets around a sum that is multiplied."""
    found = set()
    for a, b, c in permutations(numbers):
        found.update(f"{a}{first}{b}{second}{c}" for first, second in product("+-*", repeat=2))
        found.update(text for sign in "+-" for text in (f"({a}{sign}{b})*{c}", f"{a}*({b}{sign}{c})"))
    return sorted(found)


@cache
def solutions() -> dict[tuple[tuple[int, ...], int], list[str]]:
    """``(sorted numbers, target) -> its expressions``, for every countdown that can be solved."""
    table: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for numbers in combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3):
        for expression in expressions(numbers):
            target = evaluate(expression)
            if 1 <= target <= LARGEST_TARGET:
                table.setdefault((numbers, int(target)), []).append(expression)
    return table


def countdown(rng: random.Random, problem_id: str = "") -> Problem:
    numbers, target = rng.choice(_countdowns())
    shuffled = tuple(rng.sample(numbers, len(numbers)))
    prompt = f"{' '.join(map(str, shuffled))} > {target}?"
    return Problem(problem_id, prompt, str(target), "countdown", shuffled)


@cache
def _countdowns() -> list[tuple[tuple[int, ...], int]]:
    return list(solutions())


def arithmetic(rng: random.Random, problem_id: str = "") -> Problem:
    def fraction() -> str:
        denominator = rng.randint(2, 6)
        return f"{rng.randint(1, denominator - 1)}/{denominator}"

    def integer() -> str:
        return str(rng.randint(1, LARGEST_NUMBER))

    def multiple() -> str:
        return f"{rng.randint(2, 9)}*{rng.randint(2, 9)}"

    if rng.random() < FRACTION_SHARE:
        terms = rng.choice([(fraction, fraction), (integer, fraction)])
    else:
        terms = rng.choice([(integer, multiple), (multiple, integer), (integer, integer, integer)])
    sum_text = terms[0]() + "".join(rng.choice("+-") + term() for term in terms[1:])
    return Problem(problem_id, f"{sum_text}=?", str(evaluate(sum_text)), "math")


def draw(rng: random.Random, problem_id: str = "") -> Problem:
    """One problem of the mixture."""
    return (countdown if rng.random() < COUNTDOWN_SHARE else arithmetic)(rng, problem_id)


def canonical(problem: Problem) -> tuple:
    """What makes two problems the same: the order of numbers, of terms and of factors does not."""
    if problem.verifier == "countdown":
        return ("countdown", tuple(sorted(problem.numbers)), problem.answer)
    terms = re.findall(r"([+-]?)([\d*/]+)", problem.prompt)
    return ("math", tuple(sorted((sign or "+", "*".join(sorted(term.split("*")))) for sign, term in terms)))


def generate(seed: int, num_train: int, num_eval: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, all different by ``canonical``."""
    rng = random.Random(seed)
    seen: set[tuple] = set()

    def distinct(name: str, count: int) -> list[Problem]:
        problems: list[Problem] = []
        while len(problems) < count:
            problem = draw(rng, f"{name}-{len(problems)}")
            if canonical(problem) not in seen:
                seen.add(canonical(problem))
                problems.append(problem)
        return problems

    held_out = distinct("tiny-eval", num_eval)
    return distinct("tiny-train", num_train), held_out


def write(path: Path, problems: Iterable[Problem]) -> None:
    """JSON Lines, one row a problem."""
    with path.open("w") as file:
        for problem in problems:
            row = {
                "id": problem.problem_id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "verifier": problem.verifier,
                "numbers": list(problem.numbers),
            }
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Problem]:
    """The rows that ``write`` wrote."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Problem(row["id"], row["prompt"], row["answer"], row["verifier"], tuple(row["numbers"])) for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny.task", description="Write train.jsonl and eval.jsonl of the tiny task."
    )
    parser.add_argument("--out", type=Path, default=Path("recipes/tiny/data"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default: %(default)s)")
    parser.add_argument("--train", type=int, default=3000, help="training problems (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=200, help="held-out problems (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.train + options.eval > 4000:
        parser.error(f"--train + --eval: found {options.train + options.eval}, expected at most 4000 distinct problems")
    train, held_out = generate(options.seed, options.train, options.eval)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train), ("eval", held_out)):
        path = options.out / f"{name}.jsonl"
        write(path, problems)
        print(f"{path}: {len(problems)} problems, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""One answer: what is taken from a response, and a table of fixed verdicts for math-verify 0.9.0."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from megatron_ext.rollout.rewards import reward_pool
from megatron_ext.rollout.rewards.choice import letter
from megatron_ext.rollout.rewards.extraction import MAX_ANSWER_CHARS, extract
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.verify import VERIFIERS, score, score_answer
from megatron_ext.rollout.rewards.worker_pool import Program
from megatron_ext.types import Problem

RIGHT, WRONG, UNPARSABLE, FALSE = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSABLE, Outcome.CONTRADICTION

# (gold, content of the box, outcome). Where math-verify is kinder or stricter than a teacher the line says so.
TABLE = [
    # the gold's dress
    ("42", "42", RIGHT),
    ("$42$", "42", RIGHT),
    ("$$42$$", "42", RIGHT),
    (r"\(42\)", "42", RIGHT),
    (r"\[42\]", "42", RIGHT),
    (r"\boxed{42}", "42", RIGHT),
    (r"The answer is \boxed{42}.", "42", RIGHT),
    ("42\n", "42", RIGHT),
    (r"\frac{1}{2}", r"\frac{1}{2}", RIGHT),  # bare LaTeX: what the wrapping in a box is for
    ("", "42", Outcome.BAD_GOLD),
    ("@@", "42", Outcome.BAD_GOLD),
    # the answer's dress
    ("42", "$42$", RIGHT),
    ("42", r"\text{42}", RIGHT),
    ("42", r"\mathbf{42}", RIGHT),
    ("42", "042", RIGHT),
    ("42", "42.", UNPARSABLE),  # strict: a full stop inside the box
    ("12", "１２", UNPARSABLE),  # strict: full-width digits
    ("42", "the number 42", WRONG),  # letters are read as a product of symbols
    ("4", "four", WRONG),
    # signs
    ("-3", "-3", RIGHT),
    ("-3", "−3", RIGHT),  # U+2212
    ("3", "-3", WRONG),
    (r"\pm 3", "3, -3", RIGHT),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", RIGHT),
    # fractions, decimals, scientific
    ("0.5", r"\frac{1}{2}", RIGHT),
    (r"\frac{1}{2}", ".5", RIGHT),
    (r"\frac{1}{3}", "1/3", RIGHT),
    (r"\frac{1}{3}", r"\frac26", RIGHT),
    (r"\frac{3}{2}", r"1\frac{1}{2}", RIGHT),
    (r"\frac{1}{3}", "0.333333", RIGHT),  # lenient: decimals are compared after rounding to six places
    (r"\frac{1}{3}", "0.3333", WRONG),
    (r"\pi", "3.14159265", RIGHT),  # lenient: the same rounding
    ("3.14", r"\pi", WRONG),
    ("0.0015", r"1.5\times 10^{-3}", RIGHT),
    ("10000", "1e4", WRONG),  # strict: e is Euler's number
    # thousands
    ("10000", "10,000", RIGHT),
    ("10,000", "10000", RIGHT),
    ("10000", "10{,}000", RIGHT),
    ("10000", r"10\,000", RIGHT),
    ("10000", "10 000", WRONG),  # strict: read as 10 * 000
    # per cent and units
    (r"50\%", "50", RIGHT),  # lenient: per cent against the bare number ...
    ("0.5", r"50\%", RIGHT),  # ... and against the fraction
    ("5", r"50\%", WRONG),
    ("12", r"12\text{ cm}", RIGHT),
    ("12", r"12\,\mathrm{cm}^2", RIGHT),  # lenient: any unit is dropped, its power too
    ("12", r"\$12", RIGHT),
    ("12", r"12^\circ", RIGHT),
    ("12", "12 dollars", WRONG),  # strict: not in its list of units, so a product of symbols
    # sets, tuples, intervals
    (r"\{1,2\}", r"\{2,1\}", RIGHT),
    ("1,2", "2,1", RIGHT),
    (r"\{1,2\}", r"\{1,2,3\}", WRONG),
    ("4", "4,5", WRONG),
    ("4", r"4\text{ or }5", WRONG),
    ("4", r"\{4\}", RIGHT),  # lenient: a set of one
    ("(1,2)", "(2,1)", WRONG),
    ("(1,2)", "1,2", RIGHT),  # lenient: a pair without its brackets
    ("(3,-2)", "(x,y)=(3,-2)", RIGHT),
    ("(x,y)=(3,-2)", "(x, y) = (3, -2)", RIGHT),
    ("(3,-2)", "(y,x)=(-2,3)", RIGHT),  # x, y and z have an order
    ("(3,-2)", "(y,x)=(3,-2)", WRONG),
    ("(3,3)", "(x,x)=(3,3)", WRONG),
    ("(-2,3)", "(y,x)=(3,-2)", RIGHT),
    ("(-2,3)", "(x,y)=(-2,3)", RIGHT),
    ("(-2,3)", "(y,x)=(-2,3)", WRONG),
    ("(2,3)", "(m,b)=(2,3)", RIGHT),  # other names have the order in which they are written
    ("(3,5)", "y=5,x=3", RIGHT),
    ("(5,3)", "y=5,x=3", WRONG),
    ("(1,2]", "(1,2]", RIGHT),
    ("(1,2]", "[1,2]", WRONG),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)", RIGHT),
    ("x>2", r"(2,\infty)", RIGHT),
    # algebra
    (r"\sqrt{8}", r"2\sqrt{2}", RIGHT),
    ("(x+1)^2", "x^2+2x+1", RIGHT),
    ("(x+1)^2", "x^2+2x+2", WRONG),
    ("3+4i", "4i+3", RIGHT),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
    (r"\text{Tuesday}", "Tuesday", RIGHT),
    (r"\text{yes}", "no", WRONG),
    # equations: the named side may be left out, the rest must hold
    ("4", "x=4", RIGHT),
    ("x=4", "4", RIGHT),
    ("x=4", "y=4", WRONG),
    ("4", "f(2)=4", RIGHT),
    ("4", r"x=\frac{8}{2}=4", RIGHT),
    ("6", r"2\cdot 3=6", RIGHT),
    ("4", "1=2=3=4", FALSE),  # math-verify alone: right
    ("4", "3=4", FALSE),  # math-verify alone: right
    ("4", "5=x=4", FALSE),  # math-verify alone: right
    ("4,5", "1=2=4,5", FALSE),
    ("4", r"5\equiv 4", FALSE),  # math-verify alone: right
    ("4", "@@=3=4", UNPARSABLE),  # math-verify alone: right, it drops what it cannot read
    ("5", r"x=4\land y=5", UNPARSABLE),  # math-verify alone: right, the same
    ("a=b=4", "a=b=4", RIGHT),
    (r"\sum_{i=1}^{4}\sum_{j=1}^{4}1", "16", RIGHT),
    ("16", r"\sum_{i=1}^{4}\sum_{j=1}^{4}1", RIGHT),  # signs inside braces are no chain
    ("4", r"4\approx 5", UNPARSABLE),  # math-verify alone: right, it drops what follows
    ("4", "x>4", WRONG),
    ("4", r"5\neq 4", WRONG),
]


def test_table_belongs_to_the_installed_version():
    assert version("math-verify") == "0.9.0", "score the table again and say so here"


@pytest.mark.parametrize(("gold", "answer", "outcome"), TABLE)
def test_verdict(gold: str, answer: str, outcome: Outcome):
    assert score(rf"So the answer is \boxed{{{answer}}}.", gold) == (outcome is RIGHT, outcome, answer.strip())


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        (r"first \boxed{3}, no: \boxed{4}", "4"),  # math-verify alone would read the set {3, 4}
        (r"\boxed{4}, \boxed{5}", "5"),
        (r"<think>maybe \boxed{3}</think> \boxed{4}", "4"),
        (r"maybe \boxed{3}</think> \boxed{4}", "4"),  # the template opened the tag
        (r"<think>it is \boxed{4}</think> so four", None),
        (r"<think>it is \boxed{4}", None),  # cut short
        (r"</think>\boxed{4}<think>or \boxed{5}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{3 \boxed{4}}", "4"),
        (r"\boxed{3} then \boxed{4", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed4", None),
        ("4", None),
        ("", None),
    ],
)
def test_last_box_after_the_reasoning(response: str, extracted: str | None):
    assert extract(response) == extracted
    if extracted is None:
        assert score(response, "4") == (False, Outcome.NO_ANSWER, None)


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("so\nAnswer: 42", "42"),
        ("Answer: 41\nno:\nAnswer: 42\nDone.", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("### Answer: $42$.", "42"),
        ("> answer : \\(x = 42\\)", "x = 42"),
        ("Answer: $$\\frac{1}{2}$$", r"\frac{1}{2}"),
        ("Answer: $\\boxed{42}$.", "42"),
        ("Answer: 3.5.", "3.5"),
        ("Answer: 1, 2, ...", "1, 2, ..."),
        ("Answer: $1$ and $2$", "$1$ and $2$"),
        ("Answer:\n\n42\n", "42"),
        ("Answer:\nAnswer: 42", "42"),
        ("Answer: (B) 5 m/s", "(B) 5 m/s"),
        ("Answer: 41</think>Answer: 42", "42"),
        ("<think>Answer: 42", None),
        ("The answer: 42", None),
        ("Answer: \\boxed{42", None),
        ("Answer: \\boxed{}", None),
        ("Answer: 41\nAnswer:", None),
        ("Answer: **.**", None),
        (r"\boxed{42}", None),
        ("", None),
    ],
)
def test_last_answer_line_after_the_reasoning(response: str, extracted: str | None):
    assert extract(response, "answer_line") == extracted
    if extracted is None:
        assert score(response, "42", answer_format="answer_line") == (False, Outcome.NO_ANSWER, None)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        (r"\textbf{(B)}\ x", "B"), ("(A) x + y", "A"), ("(C) A and B", "C"), ("B. (5 m/s)", "B"),
        (r"\boldsymbol{B}", "B"), (r"\mathsf{B}", "B"),
        *((text, None) for text in ("(A) (B)", "(A) or (B)", "(A), (B)", "A. B", "(A) & (B)")),
    ],
)  # fmt: skip
def test_a_letter_with_its_option_and_no_second_letter(text: str, option: str | None) -> None:
    assert letter(text) == option


@pytest.mark.parametrize("text", ["$3*(6-2)=12$", r"\(3*(6-2) = 12\)", "3*(6-2) = 12.", r"$3\times(6-2)$."])
def test_a_countdown_in_the_signs_of_mathematics(text: str) -> None:
    assert VERIFIERS["countdown"](text, "12", (2, 3, 6)) is Outcome.CORRECT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer:\n\\[\n\\boxed{42}\n\\]", "42"),
        ("Answer:\n$$\n42\n$$", "42"),
        ("Answer: \\[\n42\n\\]\n", "42"),
        ("Answer: $$4$$ or 5\nso", "$$4$$ or 5"),  # what follows in its line is of the answer
    ],
)
def test_an_answer_in_a_display_of_several_lines(text: str, answer: str) -> None:
    assert extract(text, "answer_line") == answer


@pytest.mark.parametrize("verifier", ["math", "choice"])
@pytest.mark.parametrize("answer_format", ["boxed", "answer_line"])
def test_formats_and_verifiers_are_independent(answer_format: str, verifier: str):
    gold = {"math": "42", "choice": "B"}[verifier]
    for answer, outcome in ((gold, RIGHT), ({"math": "41", "choice": "A"}[verifier], WRONG)):
        response = {"boxed": rf"\boxed{{{answer}}}", "answer_line": f"Answer: {answer}"}[answer_format]
        assert score(response, gold, verifier, answer_format=answer_format) == (outcome is RIGHT, outcome, answer)


def test_a_long_answer_is_not_parsed():
    many = "(" * 3000 + "4" + ")" * 3000
    assert score(rf"\boxed{{{many}}}", "4").outcome is Outcome.TOO_LONG
    padded = "4" + " " * MAX_ANSWER_CHARS + "+0"
    assert score_answer(padded, "4", "math", ()) is Outcome.TOO_LONG
    assert score_answer("4", padded, "math", ()) is Outcome.BAD_GOLD
    assert score_answer("4".ljust(MAX_ANSWER_CHARS), "4", "math", ()) is Outcome.CORRECT


@pytest.mark.parametrize(
    ("expression", "outcome"),
    [
        ("(6-2)*3", RIGHT),
        (r"(6-2)\times 3", RIGHT),
        (r"(6-2)\cdot3", RIGHT),
        (r"\left(6-2\right)×3", RIGHT),
        (r"$ 3 \,\cdot\, (6-2) $", RIGHT),
        ("3*(6-2)=12", RIGHT),
        ("3*6-2*3", Outcome.WRONG_NUMBERS),  # 3 twice
        ("3*(6-2)+0", Outcome.WRONG_NUMBERS),
        ("12", Outcome.WRONG_NUMBERS),
        ("36-2", Outcome.WRONG_NUMBERS),
        ("6*3-2", WRONG),
        ("6/(3-3)", Outcome.WRONG_NUMBERS),
        ("3*(6-2)=13", UNPARSABLE),
        ("12=3*(6-2)", UNPARSABLE),
        ("3(6-2)", UNPARSABLE),  # every operator is written
        ("6 2 3", UNPARSABLE),
        ("6^2*3", UNPARSABLE),
        ("6**2*3", UNPARSABLE),
        ("6//2*3", UNPARSABLE),
        ("3*(6-2", UNPARSABLE),
        ("3*(6-2),12", UNPARSABLE),
        ("06-2*3", UNPARSABLE),
        ("__import__('os')", UNPARSABLE),
        ("(" * 400 + "6-2" + ")" * 400 + "*3", UNPARSABLE),
    ],
)
def test_countdown(expression: str, outcome: Outcome):
    assert score(rf"\boxed{{{expression}}}", "12", "countdown", (2, 3, 6)).outcome is outcome


@pytest.mark.parametrize(
    ("expression", "target", "numbers", "outcome"),
    [
        (r"\frac{8}{\frac{4}{2}}", "4", (2, 4, 8), RIGHT),
        (r"\dfrac{8}{2}\div 4", "1", (2, 4, 8), RIGHT),
        ("8÷2÷4", "1", (8, 4, 2), RIGHT),
        ("1/3*3", "1", (1, 3, 3), RIGHT),  # exact, not in floating point
        ("-(2-5)", "3", (5, 2), RIGHT),
        ("1--2", "3", (1, 2), RIGHT),
        ("1-4", "-3", (1, 4), RIGHT),
        ("1−4", "-3", (1, 4), RIGHT),
        ("5+5", "10", (5,), Outcome.WRONG_NUMBERS),
        ("5/(3-3)", "5", (3, 3, 5), WRONG),
        ("1000000*1000000+1", "1000000000000", (1, 1000000, 1000000), WRONG),  # no tolerance
        ("+7-2", "5", (2, 7), RIGHT),
        ("-" * 998 + "1", "1", (1,), UNPARSABLE),
        ("1/2+1/2", r"\frac{2}{2}", (1, 1, 2, 2), RIGHT),  # a target that is no plain number goes to math-verify
    ],
)
def test_countdown_values(expression: str, target: str, numbers: tuple[int, ...], outcome: Outcome):
    assert score(rf"\boxed{{{expression}}}", target, "countdown", numbers).outcome is outcome


def test_reasoning_that_the_prompt_has_opened_is_no_answer_until_it_is_closed() -> None:
    open_, closed = r"maybe \boxed{4} but wait, I", r"maybe \boxed{3}</think> \boxed{4}"
    assert [extract(text, in_thought=True) for text in (open_, closed, "")] == [None, "4", None]
    assert score(open_, "4", in_thought=True).outcome is Outcome.NO_ANSWER and score(open_, "4").correct
    problem, thinking = (Problem("", "", "4", in_thought=thought) for thought in (False, True))
    with reward_pool.RewardPool(1) as pool:
        found = pool.score([(problem, open_), (thinking, open_), (thinking, closed)])
    assert [reward.outcome for reward in found] == ["correct", "no_answer", "correct"]


def test_a_worker_imports_neither_torch_nor_gmpy():
    code = (
        "import sys\n"
        f"from {reward_pool.WORKER} import score\n"
        "assert score(r'\\boxed{1}', '1').correct\n"
        "import sympy.external.gmpy as ground\n"
        "assert ground.GROUND_TYPES == 'python', ground.GROUND_TYPES\n"
        "print([name for name in ('torch', 'pydantic', 'numpy', 'gmpy2') if name in sys.modules])"
    )
    environment = Program.of_module(reward_pool.WORKER).environment
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr

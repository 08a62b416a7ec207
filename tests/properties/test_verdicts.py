"""Verdicts on numbers: equal ones are equal however they are written, others never are."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_ext.rollout.rewards.choice import letter
from megatron_ext.rollout.rewards.extraction import MAX_ANSWER_CHARS, as_response, extract
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.verify import score, score_answer
from tests.properties.oddities import limits

SLOW = settings(max_examples=max(20, settings().max_examples // 3))
RATIONALS = st.fractions(min_value=-1000, max_value=1000, max_denominator=200) | st.integers(-(10**6), 10**6).map(
    Fraction
)


@st.composite
def written(draw: st.DrawFn, value: Fraction) -> str:
    """One of the ways to write a number, exactly."""
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    factor = draw(st.integers(1, 9))
    forms = [rf"{sign}\frac{{{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}", rf"\frac{{{sign}{top}}}{{{bottom}}}"]
    forms.append(rf"{sign}\frac{{{top * factor}}}{{{bottom * factor}}}")
    forms.append(rf"{sign}\dfrac{{{top}}}{{{bottom}}}")
    if bottom == 1:
        forms += [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{top:,}".replace(",", "{,}")]
    text = draw(st.sampled_from(forms))
    return draw(st.sampled_from(["{}", "${}$", " {} ", "x={}"])).format(text)


@SLOW
@given(data=st.data(), value=RATIONALS)
def test_a_number_is_its_own_answer(data: st.DataObject, value: Fraction) -> None:
    gold, answer = data.draw(written(value), label="gold"), data.draw(written(value), label="answer")
    assert score(rf"so \boxed{{{answer}}}", gold.strip(" $").removeprefix("x=")).outcome == Outcome.CORRECT


@SLOW
@given(data=st.data(), value=RATIONALS, other=RATIONALS)
def test_another_number_is_never_the_answer(data: st.DataObject, value: Fraction, other: Fraction) -> None:
    assume(value != other)
    gold, answer = data.draw(written(value), label="gold"), data.draw(written(other), label="answer")
    assert not score(rf"\boxed{{{answer}}}", gold.strip(" $").removeprefix("x=")).correct


NUMBERS = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@given(numbers=NUMBERS, data=st.data())
def test_a_countdown_is_right_with_its_own_value_alone(numbers: list[int], data: st.DataObject) -> None:
    text, value = str(numbers[0]), Fraction(numbers[0])
    for number in numbers[1:]:
        sign = data.draw(st.sampled_from("+-*/"))
        text = f"({text}){sign}{number}"
        value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[sign]
    assume(value.denominator == 1)
    asked = (text, str(value), "countdown", tuple(data.draw(st.permutations(numbers))))
    assert score_answer(*asked) == Outcome.CORRECT
    assert score_answer(text, str(value + 1), *asked[2:]) == Outcome.WRONG
    assert score_answer(text, str(value), "countdown", (*numbers, 1)) == Outcome.WRONG_NUMBERS


@given(before=st.text(max_size=30), inner=st.text(max_size=30), after=st.text(max_size=30))
def test_the_last_box_is_the_answer(before: str, inner: str, after: str) -> None:
    assume("\\" not in before + inner + after and "think" not in before + after + inner)
    inner = inner.replace("{", "").replace("}", "")
    assert extract(rf"{before}\boxed{{1}}{before}\boxed{{{inner}}}{after}") == (inner.strip() or None)


@SLOW
@given(text=st.text(max_size=40) | st.text("0123456789+-*/^()={}\\frac,.x %$", max_size=14))
def test_any_answer_has_an_outcome(text: str) -> None:
    """Without powers of powers, which the pool of killable workers is for."""
    assume(text.count("^") + text.count("**") + text.count("!") <= 1 and len(text) < MAX_ANSWER_CHARS)
    with limits():
        for gold in ("4", r"\frac{1}{2}", "x+1"):
            assert score_answer(text, gold, "math", ()) in Outcome
            assert score_answer(text, "24", "countdown", (4, 6)) in Outcome
            assert score_answer(text, "B", "choice", ()) in Outcome


LINE = st.text("0123456789abcdxyz+-/^(){}, ", min_size=1, max_size=20).filter(lambda text: text.strip(" -+"))


@given(before=st.text(max_size=60), answer=LINE, dress=st.sampled_from(["{}", "${}$", "**{}**", "{}.", r"\({}\)"]))
def test_the_last_answer_line_is_the_answer(before: str, answer: str, dress: str) -> None:
    assume("think" not in before and "boxed" not in before)
    text = f"{before}\nAnswer: 1\n**Answer:** {dress.format(answer)}\n"
    found = extract(text, "answer_line")
    assert found is not None and found.strip(" $()\\") == answer.strip(" ()")
    assert extract(as_response(found, "answer_line"), "answer_line") is not None
    assert extract(text) is None


@given(text=st.text(max_size=60))
def test_any_response_has_one_answer_or_none(text: str) -> None:
    with limits():
        for answer_format in ("boxed", "answer_line"):
            for response in (text, f"Answer:{text}", f"x\nAnswer: {text}", rf"\boxed{{{text}}}"):
                found = extract(response, answer_format)
                assert found is None or (found and found in response)


@given(right=st.sampled_from("ABCDEFGHIJ"), other=st.sampled_from("ABCDEFGHIJ"), data=st.data())
def test_an_option_is_right_with_its_own_letter_alone(right: str, other: str, data: st.DataObject) -> None:
    dresses = ["{}", "({})", "[{}]", "{}.", r"\text{{{}}}", r"\textbf{{({})}}", "{}. the text", "({}) 5", "option {}"]
    said = data.draw(st.sampled_from(dresses)).format(other)
    assert letter(said) == other
    assert score_answer(said, right, "choice", ()) == (Outcome.CORRECT if right == other else Outcome.WRONG)
    assert letter(f"{right} or {said}") is None

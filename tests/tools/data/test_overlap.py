"""Which training problems are in an evaluation set: by hand, and whatever their order, case and white space."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tools.data.overlap import COMMON_ROWS, EvaluationSets, ngrams, words

LONG = (
    "A baker has 17 trays with 24 rolls each and sells 9 rolls out of every tray before noon; "
    "how many rolls are left on all trays together?"
)
BOILERPLATE = (
    "The answer can be written in the form $\\frac{m}{n}$ where $m$ and $n$ are relatively prime positive integers. "
    "Find $m+n$."
)
SHORT = "Compute $\\sin 60^\\circ$."


def sets(*texts: str) -> EvaluationSets:
    return EvaluationSets((f"p{number}", text) for number, text in enumerate(texts))


def test_words_and_ngrams_by_hand() -> None:
    assert words("Find $\\frac{1}{2}x_3$,\n É!") == ["find", "frac", "1", "2", "x", "3", "é"]
    assert words("求 x 的值") == ["求", "x", "的", "值"]
    numbers = " ".join(map(str, range(15)))
    assert ngrams(numbers) == {" ".join(map(str, range(start, start + 13))) for start in range(3)}
    assert ngrams("a b") == {" a b"} and ngrams("$ $") == set()


def test_a_copy_and_a_part_of_it_are_found() -> None:
    found = sets(SHORT, LONG).matches(["Other words.", f"Some words before. {LONG}", LONG[:75], SHORT.upper()])
    assert set(found) == {1, 2, 3}
    total = len(words(LONG)) - 12
    assert (found[1].problem, found[1].shared, found[1].total) == ("p1", total, total)
    assert found[2].problem == "p1" and 0 < found[2].shared < total
    assert (found[3].problem, found[3].text) == ("p0", "compute sin 60 circ")


def test_short_phrases_are_no_overlap() -> None:
    rows = [
        "A baker has 17 trays with 24 rolls each and sells them all.",  # 12 words of it
        f"{SHORT} Then compute its square.",  # holds a short problem, and is another
        SHORT.replace("60", "30"),
    ]
    assert not sets(SHORT, LONG).matches(rows)


def test_phrases_of_many_problems_or_rows_do_not_count() -> None:
    three = sets(*(f"Problem {name}. {BOILERPLATE}" for name in ("one", "two", "three")))
    assert not three.matches([f"Quite another task. {BOILERPLATE}"])
    assert set(three.matches([f"Problem two. {BOILERPLATE}"])) == {0}  # of which nothing is missing
    one = sets(f"Problem one, which is long enough. {BOILERPLATE}")
    rows = [f"Row number {number} asks for a thing. {BOILERPLATE}" for number in range(COMMON_ROWS + 1)]
    assert not one.matches(rows) and len(one.matches(rows[:-1])) == COMMON_ROWS


def test_a_problem_in_many_sets_is_still_found() -> None:
    assert set(sets(LONG, LONG.upper(), LONG, f"{LONG}!").matches([LONG])) == {0}
    assert set(sets(LONG).matches([f"{number}. {LONG}" for number in range(50)])) == set(range(50))


TEXTS = st.lists(
    st.sampled_from([LONG, LONG[:90], LONG[40:], BOILERPLATE, SHORT, "What is 2+2?", "x" * 40]), min_size=1
)


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(0, 2**20))
def test_order_case_and_white_space_change_no_verdict(problems: list[str], rows: list[str], seed: int) -> None:
    chance = random.Random(seed)

    def dressed(text: str) -> str:
        spaced = "".join(chance.choice([" ", "\n", "\t  "]) if char == " " else char for char in text)
        return chance.choice([spaced, spaced.upper(), f"  {spaced}\n"])

    order = chance.sample(range(len(rows)), len(rows))
    verdicts = set(sets(*problems).matches(rows))
    assert {order[number] for number in sets(*problems).matches([dressed(rows[i]) for i in order])} == verdicts
    shuffled = chance.sample(problems, len(problems))
    assert set(sets(*map(dressed, shuffled)).matches(rows)) == verdicts

"""Every public set in its true schema, a few problems of our own, through the command: what comes out trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_ext.config.public_sets import public_sets
from megatron_ext.data.dataset import load_problems
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from tests.tools.data.conftest import Run, read, write
from tools.data.adapters import ADAPTERS, last_box, text_of, whole

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
SYSTEM = {"role": "system", "content": "Think for a long time. " * 50}


def verl(prompt: list[dict[str, str]], gold: str, index: object) -> dict[str, Any]:
    return {
        "data_source": "math",
        "prompt": prompt,
        "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": index},
    }


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def problem(name: str, answer: str, prompt: str, **rest: str) -> dict[str, str]:
    return {"id": name, "prompt": prompt, "answer": answer, "verifier": "math", **rest}


class Case(NamedTuple):
    """``file`` ends in how the set is written; ``name`` is the set's."""

    name: str
    file: str
    rows: list[Any]
    expected: list[dict[str, str]]


GPQA = {
    "Question": "Which of these is a metal at 25 degrees Celsius?",
    "Correct Answer": "copper\n",
    "Incorrect Answer 1": "neon",
    "Incorrect Answer 2": "sulfur",
    "Incorrect Answer 3": "bromine",
    "Record ID": "rec7",
    "High-level domain": "Chemistry",
}
CASES = [
    Case(
        "dapo-math-17k",
        "train.parquet",
        [verl(user(DAPO.format(f"Add {i} and 5.")), str(i + 5), f"uuid{i}") for i in (1, 2, 1, 2, 1)],
        [problem(f"dapo-math-17k-uuid{i}", str(i + 5), f"Add {i} and 5.") for i in (1, 2)],
    ),
    Case(
        "dapo-math-17k",
        "train.parquet",
        [
            {
                **verl(user("unused"), "34", "u1"),
                "prompt": "Find $17 \\cdot 2$.",
                "solution": "34",
                "source_prompt": user(DAPO.format("Find $17 \\cdot 2$.")),
            }
        ],
        [problem("dapo-math-17k-u1", "34", "Find $17 \\cdot 2$.")],
    ),
    Case(
        "openr1-math-46k-8192",
        "train.parquet",
        [
            {
                **verl([SYSTEM, *user("Half of $x$ is 4. Find $x$.")], "$8$", -1),
                "target": [{"role": "assistant", "content": "<think>4 + 4</think> 8"}],
            }
        ],
        [problem("openr1-math-46k-8192--1", "$8$", "Half of $x$ is 4. Find $x$.")],
    ),
    Case(
        "openr1-math-220k",
        "train.parquet",
        [
            {
                "problem": "Solve $3x=12$.",
                "answer": "4",
                "problem_type": "Algebra",
                "question_type": "math-word-problem",
                "uuid": "a",
                "generations": ["..."],
            },
            {
                "problem": "Which is even? (A) 3 (B) 4",
                "answer": "B",
                "problem_type": "Number Theory",
                "question_type": "MCQ",
                "uuid": "b",
                "generations": ["..."],
            },
        ],
        [
            problem("openr1-math-220k-a", "4", "Solve $3x=12$.", kind="Algebra"),
            problem("openr1-math-220k-b", "B", "Which is even? (A) 3 (B) 4", verifier="choice", kind="Number Theory"),
        ],
    ),
    Case(
        "deepscaler",
        "deepscaler.json",
        [{"problem": "What is $7^2$?", "answer": "49", "solution": "7 times 7"}],
        [problem("deepscaler-1", "49", "What is $7^2$?")],
    ),
    Case(
        "polaris-53k",
        "polaris.jsonl",
        [{"problem": "What is $8^2$?", "answer": "64", "difficulty": "3/8"}],
        [problem("polaris-53k-1", "64", "What is $8^2$?", level="3/8")],
    ),
    Case(
        "orz-57k",
        "orz_math_57k_collected.json",
        [
            [
                {"from": "human", "value": f"Double {i}."},
                {"from": "assistant", "ground_truth": {"value": str(2 * i), "pass_at_n": 0.5}},
            ]
            for i in (3, 4)
        ],
        [problem("orz-57k-1", "6", "Double 3."), problem("orz-57k-2", "8", "Double 4.")],
    ),
    Case(
        "math",
        "algebra",
        [
            {
                "problem": "Simplify $x+x$.",
                "level": "Level 2",
                "type": "Algebra",
                "solution": "It is $\\boxed{y}$ or rather \\[x+x=\\boxed{2x}.\\]",
            },
            {"problem": "How many are $2+3$?", "level": "Level ?", "type": "Prealgebra", "solution": "$\\boxed 5$."},
        ],
        [
            problem("math-1", "2x", "Simplify $x+x$.", kind="Algebra", level="2"),
            problem("math-2", "5", "How many are $2+3$?", kind="Prealgebra"),
        ],
    ),
    Case(
        "math",
        "train.parquet",
        [
            {
                "problem": "Halve 3.",
                "solution": "...",
                "answer": "\\frac{3}{2}",
                "subject": "Prealgebra",
                "level": 1,
                "unique_id": "train/prealgebra/1.json",
            }
        ],
        [problem("math-train/prealgebra/1.json", "\\frac{3}{2}", "Halve 3.", kind="Prealgebra", level="1")],
    ),
    Case(
        "gsm8k",
        "train.parquet",
        [
            {
                "question": "Ann sells 400 cups at 3 dollars. How much does she get?\n",
                "answer": "She gets 400*3=<<400*3=1200>>1200.\n#### 1,200",
            }
        ],
        [problem("gsm8k-1", "1200", "Ann sells 400 cups at 3 dollars. How much does she get?")],
    ),
    Case(
        "aime24",
        "train.parquet",
        [{"id": 60, "problem": "Find $5 \\cdot 5$.", "solution": "...", "answer": "025", "url": "", "year": "2024"}],
        [problem("aime24-60", "25", "Find $5 \\cdot 5$.")],
    ),
    Case(
        "aime24",
        "aime_2024_problems.parquet",
        [{"ID": "2024-II-4", "Problem": "Find $3 \\cdot 11$.", "Solution": "...", "Answer": 33}],
        [problem("aime24-2024-II-4", "33", "Find $3 \\cdot 11$.")],
    ),
    Case(
        "aime25",
        "aime2025-I.jsonl",
        [{"question": "Find $7 \\cdot 10$.", "answer": "70"}],
        [problem("aime25-1", "70", "Find $7 \\cdot 10$.")],
    ),
    Case(
        "aime25",
        "train.parquet",
        [{"id": 1, "problem": "Find $7 \\cdot 11$.", "answer": "77", "solution": "...", "year": 2025}],
        [problem("aime25-1", "77", "Find $7 \\cdot 11$.")],
    ),
    Case(
        "amc23-83",
        "train.parquet",
        [{"id": 0, "problem": "Find $9+18$.", "answer": 27.0, "url": ""}],
        [problem("amc23-83-0", "27", "Find $9+18$.")],
    ),
    Case(
        "amc23",
        "test.jsonl",
        [{"id": 0, "question": "Find $9+19$.", "answer": "28.0", "url": ""}],
        [problem("amc23-0", "28", "Find $9+19$.")],
    ),
    Case(
        "math500",
        "test.jsonl",
        [
            {
                "problem": "Polar form of $(0,2)$?",
                "solution": "...",
                "answer": "\\left( 2, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 4,
                "unique_id": "test/precalculus/1.json",
            }
        ],
        [
            problem(
                "math500-test/precalculus/1.json",
                "\\left( 2, \\frac{\\pi}{2} \\right)",
                "Polar form of $(0,2)$?",
                kind="Precalculus",
                level="4",
            )
        ],
    ),
    Case(
        "olympiadbench",
        "OE_TO_maths_en_COMP.parquet",
        [
            {
                "id": 11,
                "question": "Solve $x^2=9$.",
                "context": None,
                "final_answer": ["$3,-3$"],
                "unit": None,
                "is_multiple_answer": True,
                "answer_type": "Numerical",
                "subfield": "Algebra",
                "difficulty": "Competition",
            },
            {
                "id": 12,
                "question": "How high is it?",
                "context": "A tower of 5 floors, 3 m each.",
                "final_answer": ["$15$"],
                "unit": "m",
                "is_multiple_answer": False,
                "answer_type": "Numerical",
                "subfield": "Geometry",
                "difficulty": "Competition",
            },
            {
                "id": 13,
                "question": "Both roots of $x^2=4$?",
                "context": None,
                "final_answer": ["$2$", "$-2$"],
                "unit": None,
                "is_multiple_answer": True,
                "answer_type": "Numerical",
                "subfield": "Algebra",
                "difficulty": "Competition",
            },
        ],
        [
            problem("olympiadbench-11", "3,-3", "Solve $x^2=9$.", kind="Algebra", level="Competition"),
            problem(
                "olympiadbench-12",
                "15",
                "A tower of 5 floors, 3 m each.\nHow high is it?",
                kind="Geometry",
                level="Competition",
            ),
            problem("olympiadbench-13", "2, -2", "Both roots of $x^2=4$?", kind="Algebra", level="Competition"),
        ],
    ),
    Case(
        "minerva",
        "test.jsonl",
        [{"question": "What is 2 to the tenth?\n", "answer": "1024\n"}],
        [problem("minerva-1", "1024", "What is 2 to the tenth?")],
    ),
    Case(
        "minerva",
        "minerva.arrow",
        [{"problem": "What is 2 to the eleventh?", "solution": "...", "answer": ["2048"]}],
        [problem("minerva-1", "2048", "What is 2 to the eleventh?")],
    ),
    Case(
        "omni-math",
        "test.jsonl",
        [
            {
                "domain": ["Mathematics -> Number Theory -> Primes -> Other"],
                "difficulty": 4.5,
                "problem": "Least prime?",
                "solution": "...",
                "answer": "2",
                "source": "ours",
            }
        ],
        [problem("omni-math-1", "2", "Least prime?", kind="Number Theory", level="4.5")],
    ),
    Case(
        "gpqa",
        "gpqa_diamond.csv",
        [GPQA],
        [
            problem(
                "gpqa-rec7",
                "C",
                f"{GPQA['Question']}\n\nA. sulfur\nB. neon\nC. copper\nD. bromine",
                verifier="choice",
                kind="Chemistry",
            )
        ],
    ),
    *(
        Case(
            name,
            "train.parquet",
            [{"problem_idx": 1, "problem": "What is $3!$?", "answer": "6", "problem_type": ["Combinatorics"]}],
            [problem(f"{name}-1", "6", "What is $3!$?", kind="Combinatorics")],
        )
        for name in ("hmmt25", "brumo25", "cmimc25")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{case.file}" for case in CASES])
def test_a_set_in_its_own_schema(case: Case, run: Run, pool: RewardPool, tmp_path: Path) -> None:
    source, out = write(tmp_path / "source" / case.file, case.rows), tmp_path / "out.jsonl"
    assert run(case.name, source, "--out", out) == 0
    assert read(out) == case.expected
    problems, report = load_problems(out, score=pool.score, strict=True)
    assert [each.problem_id for each in problems] == [row["id"] for row in case.expected] and not report.faults


def test_every_set_has_an_adapter_and_a_case() -> None:
    made_of_others = {name for name, found in public_sets().items() if found.parts}
    assert set(ADAPTERS) == set(public_sets())
    assert {case.name for case in CASES} == set(ADAPTERS) - made_of_others


def test_gpqa_options_depend_on_the_question_alone(run: Run, tmp_path: Path) -> None:
    """Other rows, another order of rows and another id leave a question's options where they were."""
    others = [GPQA | {"Question": f"Question {i}?", "Record ID": f"r{i}"} for i in range(12)]
    for number, rows in enumerate(([GPQA, *others], [*others[::-1], GPQA | {"Record ID": "x"}])):
        assert run("gpqa", write(tmp_path / f"{number}.parquet", rows), "--out", tmp_path / f"{number}.jsonl") == 0
    first, second = ({row["prompt"]: row["answer"] for row in read(tmp_path / f"{i}.jsonl")} for i in range(2))
    assert first == second and set(first.values()) == set("ABCD")


def test_golds_by_hand() -> None:
    assert [text_of(value) for value in (27.0, 0.5, 3, " 5\n", ["a", "b"], [7], None, [])] == [
        *("27", "0.5", "3", "5", "a, b", "7", None, None)
    ]
    assert [whole(value) for value in ("27.0", "007", "-3", "1/2", 12.0, None)] == ["27", "7", "-3", "1/2", "12", None]
    boxes = {
        r"$\boxed{\frac{1}{2}}$": r"\frac{1}{2}",
        r"\boxed{1} then \fbox{2}": "2",
        r"\boxed 7.": "7",
        r"\boxed 7 and \boxed{8}": "8",
        "none": None,
        r"\boxed{": None,
    }
    assert {text: last_box(text) for text in boxes} == boxes

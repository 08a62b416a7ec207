"""A row of each public set as its publisher writes it, holding a problem of the tiny task.

``row(number, problem)``: ``number`` counts the set's rows from 0. What an adapter takes off or converts is there: chat
turns, DAPO's wrapper, three digits of AIME, floats of AMC, lists, dollars, ``####``.
"""

from __future__ import annotations

import uuid
from typing import Any

from megatron_ext.types import Problem

from .suite import is_countdown, level
from .task import solutions

Row = Any  # a dict, or for orz-57k a list of turns
DAPO_WRAPPER = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
LONG_SYSTEM_PROMPT = " ".join(["Think for a long time, check every step, and only then give the answer."] * 12)
CONTEXT = "use each number once"  # of every fourth problem of olympiadbench


def expression(problem: Problem) -> str:
    """Of a countdown the first of its solutions, of arithmetic the question itself."""
    if is_countdown(problem):
        return solutions()[tuple(sorted(problem.numbers)), int(problem.answer)][0]
    return problem.prompt.removesuffix("=?")


def subject(problem: Problem) -> str:
    return "Number Theory" if is_countdown(problem) else "Prealgebra"


def _solution(problem: Problem) -> str:
    return rf"${expression(problem)}=\boxed{{{problem.answer}}}$"


def _uuid(problem: Problem) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, problem.problem_id))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _verl(source: str, prompt: list[dict[str, str]], problem: Problem, style: str, extra: dict[str, Any]) -> Row:
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "MATH",
        "reward_model": {"ground_truth": problem.answer, "style": style},
        "extra_info": extra,
    }


def dapo(number: int, problem: Problem) -> Row:
    prompt = [_turn("user", DAPO_WRAPPER.format(problem.prompt))]
    return _verl("math_dapo", prompt, problem, "rule-lighteval/MATH_v2", {"index": _uuid(problem)})


def openr1_46k(number: int, problem: Problem) -> Row:
    prompt = [_turn("system", LONG_SYSTEM_PROMPT), _turn("user", problem.prompt)]
    row = _verl("openr1", prompt, problem, "rule", {"index": -1, "split": "default"})
    return row | {"target": [_turn("assistant", f"<think>\n{expression(problem)}\n</think>\n{_solution(problem)}")]}


def openr1_220k(number: int, problem: Problem) -> Row:
    generation = f"<think>\n{expression(problem)}\n</think>\n{_solution(problem)}"
    return {
        "problem": problem.prompt,
        "solution": _solution(problem),
        "answer": problem.answer,
        "problem_type": subject(problem),
        "question_type": "math-word-problem",
        "source": "tiny",
        "uuid": _uuid(problem),
        "is_reasoning_complete": [True],
        "generations": [generation],
        "correctness_math_verify": [True],
        "correctness_count": 1,
        "messages": [_turn("user", problem.prompt), _turn("assistant", generation)],
    }


def deepscaler(number: int, problem: Problem) -> Row:
    return {"problem": problem.prompt, "answer": problem.answer, "solution": _solution(problem)}


def polaris(number: int, problem: Problem) -> Row:
    return {"problem": problem.prompt, "answer": problem.answer, "difficulty": f"{number % 8}/8"}


def orz(number: int, problem: Problem) -> Row:
    truth = {"value": problem.answer, "pass_at_n": (number % 8) / 8}
    return [{"from": "human", "value": problem.prompt}, {"from": "assistant", "ground_truth": truth}]


def _hendrycks(split: str, number: int, problem: Problem) -> Row:
    return {
        "problem": problem.prompt,
        "solution": _solution(problem),
        "answer": problem.answer,
        "subject": subject(problem),
        "level": int(level(problem)),
        "unique_id": f"{split}/{subject(problem).lower().replace(' ', '_')}/{number}.json",
    }


def math(number: int, problem: Problem) -> Row:
    return _hendrycks("train", number, problem)


def math500(number: int, problem: Problem) -> Row:
    return _hendrycks("test", number, problem)


def gsm8k(number: int, problem: Problem) -> Row:
    text, answer = expression(problem), problem.answer
    return {"question": problem.prompt, "answer": f"It is {text}=<<{text}={answer}>>{answer}.\n#### {answer}"}


def aime24(number: int, problem: Problem) -> Row:
    return _aime("2024", 60 + number, problem)


def aime25(number: int, problem: Problem) -> Row:
    return _aime("2025", number, problem)


def _aime(year: str, number: int, problem: Problem) -> Row:
    return {
        "id": number,
        "problem": problem.prompt,
        "solution": _solution(problem),
        "answer": f"{int(problem.answer):03d}",
        "url": "",
        "year": year,
    }


def amc_83(number: int, problem: Problem) -> Row:
    return {"id": number, "problem": problem.prompt, "answer": float(problem.answer), "url": ""}


def amc_40(number: int, problem: Problem) -> Row:
    return {"id": number, "question": problem.prompt, "answer": f"{problem.answer}.0", "url": ""}


def olympiadbench(number: int, problem: Problem) -> Row:
    return {
        "id": 1600 + number,
        "question": problem.prompt,
        "solution": [_solution(problem)],
        "final_answer": [f"${problem.answer}$"],
        "context": CONTEXT if number % 4 == 0 else None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": subject(problem),
        "subject": "Math",
        "language": "English",
    }


def minerva(number: int, problem: Problem) -> Row:
    return {"question": f"{problem.prompt}\n", "answer": f"{problem.answer}\n"}


def omni_math(number: int, problem: Problem) -> Row:
    return {
        "domain": [f"Mathematics -> {subject(problem)} -> Other"],
        "difficulty": float(level(problem)) + 0.5,
        "problem": problem.prompt,
        "solution": _solution(problem),
        "answer": problem.answer,
        "source": "tiny",
    }


def gpqa(number: int, problem: Problem) -> Row:
    wrong = [str(int(problem.answer) + difference) for difference in (1, 2, 10)]
    return {
        "Record ID": f"rec{number}",
        "Question": problem.prompt,
        "Correct Answer": f"{problem.answer}\n",
        **{f"Incorrect Answer {i}": text for i, text in enumerate(wrong, 1)},
        "Explanation": _solution(problem),
        "Subdomain": subject(problem),
        "High-level domain": "Mathematics",
    }


def matharena(number: int, problem: Problem) -> Row:
    return {
        "problem_idx": number + 1,
        "problem": problem.prompt,
        "answer": problem.answer,
        "problem_type": [subject(problem)],
    }

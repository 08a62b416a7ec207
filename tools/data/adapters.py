"""What the columns of each public set mean: ``ADAPTERS[name]`` are the forms in which it is published.

A form names the columns that it needs and turns a row of them into the fields of a problem. The first form whose
columns are all there is taken. Facts about the sets are from their cards and loaders; ``megatron-entropy data --list``
says which copy of a set is meant.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.public_sets import public_sets
from megatron_ext.rollout.rewards.extraction import extract

Row = Mapping[str, Any]
FIELDS = ("prompt", "answer", "id", "verifier", "numbers", "kind", "level")
DAPO_OPENING = re.compile(  # what DAPO puts around every problem
    r"Solve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"\S+ \(without quotes\) where \S+ is the answer to the problem\.\s*"
)
DAPO_CLOSING = re.compile(r'\s*Remember to put your answer on its own line after "Answer:"\.?\s*$')
BARE_BOX = r"\\(?:boxed|fbox)\s+([^\s$\\.,]+)"  # a box without braces


@dataclass(frozen=True)
class Form:
    """``columns`` must be there; ``convert`` takes a row to FIELDS, of which any but the prompt may be None."""

    columns: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


def form_of(name: str, columns: Sequence[str], mapping: Mapping[str, str]) -> Form:
    """The form in which the set ``name`` is read from ``columns``; with a ``mapping`` that alone counts.

    Raises ConfigError for an unknown set, and for columns of no form of it: these and those expected are named.
    """
    if mapping:
        return _mapped(mapping, columns)
    if name not in ADAPTERS:
        raise ConfigError(
            f"data: there is no set called {name!r}; expected one of {', '.join(ADAPTERS)}, or say which columns hold "
            f"the problem: --map prompt=COLUMN,answer=COLUMN (found {', '.join(columns)})"
        )
    for form in (PROBLEM_ROWS, *ADAPTERS[name]):
        if set(form.columns) <= set(columns):
            return form
    expected = "; or ".join(", ".join(form.columns) for form in (*ADAPTERS[name], PROBLEM_ROWS))
    raise ConfigError(
        f"data: {name}: found the columns {', '.join(columns)}; expected {expected}. If this is the right copy, say "
        "which columns hold the problem: --map prompt=COLUMN,answer=COLUMN"
    )


def text_of(value: Any) -> Any:
    """A gold answer as text: 27.0 is 27, a list its elements with commas; what is no answer stays as it is."""
    if isinstance(value, list | tuple):
        parts = [text_of(part) for part in value if part is not None]
        return ", ".join(parts) if parts and all(isinstance(part, str) for part in parts) else parts or None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else value


def whole(value: Any) -> Any:
    """The same for answers that are integers: also the texts ``"27.0"`` and ``"027"`` are 27."""
    text = text_of(value)
    return str(int(float(text))) if isinstance(text, str) and re.fullmatch(r"[+-]?\d{1,15}(\.0*)?", text) else text


def last_box(solution: Any) -> str | None:
    """What stands in the last box of a solution, which may be ``\\fbox{}`` or ``\\boxed 5``."""
    if not isinstance(solution, str):
        return None
    bare = list(re.finditer(BARE_BOX, solution))
    if bare and not re.search(r"\\(?:boxed|fbox)\s*\{", solution[bare[-1].start() :]):
        return bare[-1][1]
    return extract(solution.replace(r"\fbox", r"\boxed"))


def user_turn(prompt: Any) -> Any:
    """The last user turn of a chat in either spelling (role, content; from, value); a text stays as it is."""
    if not isinstance(prompt, list):
        return prompt
    for turn in reversed(prompt):
        if isinstance(turn, dict) and (turn.get("role") or turn.get("from")) in ("user", "human"):
            return turn.get("content") or turn.get("value")
    return None


def without_dapo_wrapper(prompt: Any) -> Any:
    """The problem alone, without DAPO's instruction before and behind it."""
    return DAPO_CLOSING.sub("", DAPO_OPENING.sub("", prompt, count=1)) if isinstance(prompt, str) else prompt


def fields_of(row: Row) -> dict[str, Any]:
    """Of a row that is a problem row already."""
    return {field: row[field] for field in FIELDS if row.get(field) is not None}


def _plain(
    prompt: str,
    answer: str,
    *,
    gold: Callable[[Any], Any] = text_of,
    problem_id: str = "",
    kind: str = "",
    level: str = "",
) -> Form:
    """A column for each field; those of id, kind and level may be missing."""

    def convert(row: Row) -> dict[str, Any]:
        return {
            "prompt": row[prompt],
            "answer": gold(row[answer]),
            "id": text_of(row.get(problem_id)),
            "kind": text_of(row.get(kind)),
            "level": text_of(row.get(level)),
        }

    return Form((prompt, answer), convert)


def _mapped(mapping: Mapping[str, str], columns: Sequence[str]) -> Form:
    """``field=column``; a column may go on into what it holds, as in ``answer=reward_model.ground_truth``."""
    unknown = [field for field in mapping if field not in FIELDS]
    missing = [path for path in mapping.values() if path.partition(".")[0] not in columns]
    if unknown or missing or not {"prompt", "answer"} <= set(mapping):
        raise ConfigError(
            f"--map: expected prompt=COLUMN,answer=COLUMN and any of {', '.join(FIELDS[2:])}, from the columns "
            f"{', '.join(columns)}; found {', '.join(f'{field}={path}' for field, path in mapping.items())}"
        )

    def convert(row: Row) -> dict[str, Any]:
        found = {field: _at(row, path) for field, path in mapping.items()}
        return found | {"prompt": user_turn(found["prompt"]), "answer": text_of(found["answer"])}

    return Form(tuple(mapping.values()), convert)


def _at(row: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(row, Mapping):
            row = row.get(part)
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _verl(row: Row) -> dict[str, Any]:
    """verl's schema: chat turns, and the gold answer in reward_model."""
    return {
        "prompt": without_dapo_wrapper(user_turn(row["prompt"])),
        "answer": text_of(_at(row, "reward_model.ground_truth")),
        "id": text_of(_at(row, "extra_info.index")),
    }


def _dapo_processed(row: Row) -> dict[str, Any]:
    return _verl(row) | {"answer": text_of(row["solution"])}


def _orz(row: Row) -> dict[str, Any]:
    """A row is a list of two turns, whose numbers are the columns."""
    return {"prompt": _at(row, "0.value"), "answer": text_of(_at(row, "1.ground_truth.value"))}


def _openr1(row: Row) -> dict[str, Any]:
    answer = text_of(row["answer"])
    is_choice = row.get("question_type") == "MCQ" and isinstance(answer, str) and re.fullmatch("[A-Z]", answer)
    return {
        "prompt": row["problem"],
        "answer": answer,
        "id": text_of(row.get("uuid")),
        "kind": text_of(row.get("problem_type")),
        "verifier": "choice" if is_choice else "math",
    }


def _math(row: Row) -> dict[str, Any]:
    answer, level = text_of(row.get("answer")), text_of(row.get("level")) or ""
    return {
        "prompt": row["problem"],
        "answer": last_box(row["solution"]) if answer is None else answer,
        "id": text_of(row.get("unique_id")),
        "kind": row.get("type") or row.get("subject"),
        "level": level.removeprefix("Level ").strip("?"),
    }


def _gsm8k(answer: Any) -> Any:
    if not isinstance(answer, str):
        return answer
    _, mark, gold = answer.rpartition("#### ")
    return gold.strip().replace(",", "") if mark else None


def _olympiad(row: Row) -> dict[str, Any]:
    """Answers are lists of LaTeX in dollars; some problems go on from a context."""
    answer, context = text_of(row["final_answer"]), row.get("context")
    return {
        "prompt": f"{context.strip()}\n{row['question']}" if context else row["question"],
        "answer": answer.replace("$", "") if isinstance(answer, str) else answer,
        "id": text_of(row.get("id")),
        "kind": row.get("subfield"),
        "level": row.get("difficulty"),
    }


def _omni_math(row: Row) -> dict[str, Any]:
    """The domain is a path such as ``Mathematics -> Algebra -> Other``, of which the second part is the kind."""
    domain = row.get("domain")
    first = domain[0] if isinstance(domain, list) and domain else domain if isinstance(domain, str) else ""
    path = [part.strip() for part in first.split("->")]
    kind = path[1] if len(path) > 1 else path[0]
    level = text_of(row.get("difficulty"))
    return {"prompt": row["problem"], "answer": text_of(row["answer"]), "kind": kind, "level": level}


def _gpqa(row: Row) -> dict[str, Any]:
    """Four options by the hashes of the question with each: the same order in every copy and order of the rows."""
    question = row["Question"]
    texts = [text_of(row["Correct Answer"]), *(text_of(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3))]
    if not isinstance(question, str) or not all(isinstance(text, str) for text in texts):
        return {"prompt": question, "answer": None}
    correct = texts[0]
    texts.sort(key=lambda text: hashlib.sha256(f"{question.strip()}\n{text}".encode()).digest())
    options = [f"{letter}. {text}" for letter, text in zip("ABCD", texts, strict=True)]
    return {
        "prompt": question.strip() + "\n\n" + "\n".join(options),
        "answer": "ABCD"[texts.index(correct)],
        "id": text_of(row.get("Record ID")),
        "verifier": "choice",
        "kind": row.get("High-level domain"),
    }


PROBLEM_ROWS = Form(("id", "prompt", "answer", "verifier"), fields_of)  # every set may come as its prepared file
VERL = Form(("prompt", "reward_model"), _verl)
MATHARENA = (_plain("problem", "answer", problem_id="problem_idx", kind="problem_type"),)
AMC = tuple(_plain(column, "answer", gold=whole, problem_id="id") for column in ("problem", "question"))
GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
ADAPTERS: dict[str, tuple[Form, ...]] = {
    "dapo-math-17k": (Form(("prompt", "solution", "reward_model"), _dapo_processed), VERL),
    "openr1-math-46k-8192": (VERL,),
    "openr1-math-220k": (Form(("problem", "answer"), _openr1),),
    "deepscaler": (_plain("problem", "answer"),),
    "polaris-53k": (_plain("problem", "answer", level="difficulty"),),
    "orz-57k": (
        Form(("0", "1"), _orz),
        Form(("conversations",), lambda row: _orz({str(i): turn for i, turn in enumerate(row["conversations"])})),
    ),
    "math": (Form(("problem", "solution"), _math),),
    "gsm8k": (_plain("question", "answer", gold=_gsm8k),),
    "aime24": (
        _plain("problem", "answer", gold=whole, problem_id="id"),
        _plain("Problem", "Answer", gold=whole, problem_id="ID"),
        VERL,
    ),
    "aime25": (
        _plain("problem", "answer", gold=whole, problem_id="id"),
        _plain("question", "answer", gold=whole),
        _plain("Problem", "Answer", gold=whole, problem_id="ID"),
        VERL,
    ),
    "amc23-83": AMC,
    "amc23": AMC,
    "math500": (_plain("problem", "answer", problem_id="unique_id", kind="subject", level="level"),),
    "olympiadbench": (Form(("question", "final_answer"), _olympiad),),
    "minerva": (_plain("question", "answer", kind="type"), _plain("problem", "answer", kind="type")),
    "omni-math": (Form(("problem", "answer"), _omni_math),),
    "gpqa": (Form(GPQA_COLUMNS, _gpqa),),
    "hmmt25": MATHARENA,
    "brumo25": MATHARENA,
    "cmimc25": MATHARENA,
}
ADAPTERS |= {name: () for name, found in public_sets().items() if found.parts}  # of other sets' problem rows

"""Problems to train on: load and check a JSON Lines file, encode prompts.

A line is a problem: ``prompt``, ``answer`` and optionally ``id``, ``verifier``, ``numbers``, ``kind``, ``level``; other
keys are ignored. Problems are left out, and reported by line and field, for one of two reasons:

- a fault. Problems with one may be a small share of the file (``max_left_out``): above it something is wrong with the
  whole file, and the run stops. A gold answer that the verifier cannot read, or does not accept as an answer to
  itself, stops the run at once unless such golds are to count like other faults (``skip_unparsable_gold``). Under a
  reward function of the user's own a gold answer is whatever that reads, and is not checked.
- a repeated prompt with the same answer, or a prompt longer than the recipe wants: nothing is wrong with these, and
  their number is not limited.

Under ``strict`` both stop the run. An id that several problems have is made one of its own for each, and counted.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.public_sets import how_to_make
from megatron_ext.config.schema import Config, DataConfig, PromptConfig
from megatron_ext.data.prompts import NO_PROMPT, encode_prompts
from megatron_ext.files import read_lines
from megatron_ext.rollout.rewards.extraction import as_response
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.verify import VERIFIERS
from megatron_ext.types import Problem, Reward

SCHEMA = '{"prompt": "What is 2+2?", "answer": "4"}'
NUM_LISTED = 5  # faults spelt out in a message

FaultKind = (
    Literal["not_json", "missing", "wrong_type", "empty", "invalid", "conflicting", "unparsable_gold"]
    | Literal["duplicate", "overlong_prompt"]
)
HARMLESS = ("duplicate", "overlong_prompt")  # nothing is wrong with the problem
MAX_LEFT_OUT = DataConfig().max_left_out
Score = Callable[[Sequence[tuple[Problem, str]]], list[Reward]]


@dataclass(frozen=True)
class Fault:
    """What is wrong with one problem. ``where`` is ``line 17`` (counted from 1) or ``problem <id>``."""

    where: str
    field: str
    kind: FaultKind
    message: str

    def __str__(self) -> str:
        return f"{self.where}, field {self.field}: {self.message}"


@dataclass(frozen=True)
class DataReport:
    """How many problems were read and kept, and why the others were not."""

    num_read: int
    num_kept: int
    faults: tuple[Fault, ...]
    num_renamed: int = 0  # problems whose id another one had

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(fault.kind for fault in self.faults))

    def summary(self) -> str:
        """A line with the counts and one for each of the first faults of every kind."""
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
        lines = [f"{self.num_kept} of {self.num_read} problems kept" + (f"; left out: {counts}" if counts else "")]
        if self.num_renamed:
            lines[0] += f"; {self.num_renamed} with the id of another problem, which now end in @ and the line's number"
        for kind in self.counts:
            lines += _listed([fault for fault in self.faults if fault.kind == kind])
        return "\n".join(lines)


def load_problems(
    path: str | Path,
    *,
    score: Score | None,
    strict: bool = False,
    max_left_out: float = MAX_LEFT_OUT,
    skip_unparsable_gold: bool = False,
    answer_format: str = "boxed",
) -> tuple[list[Problem], DataReport]:
    """The problems of a JSON Lines file and a report on those left out.

    ``score`` scores ``(problem, response)`` pairs, for example ``RewardPool.score``; every gold answer is scored
    against itself (None: it is not), in a response of ``answer_format``, which is that of ``score``. Raises
    ``ConfigError`` for a file that cannot be read, for an unparsable gold answer unless ``skip_unparsable_gold``, for
    faults in more than the share ``max_left_out``, for any when ``strict``, and when no problem is left.
    """
    lines = _read_lines(Path(path))
    problems, faults = _check_lines(lines)
    bad_gold = {} if score is None else check_gold(problems, score, answer_format)
    faults += bad_gold.values()
    kept, num_renamed = _with_own_ids({line: problem for line, problem in problems.items() if line not in bad_gold})
    report = DataReport(len(lines), len(kept), tuple(faults), num_renamed)
    if strict and faults:
        raise ConfigError(
            f"data.train: {path} has {len(faults)} faults in {len(lines)} problems and data.strict is on; "
            "correct or remove the lines, or set data.strict = false to leave them out\n" + "\n".join(_listed(faults))
        )
    if bad_gold and not skip_unparsable_gold:
        raise ConfigError(
            f"data.train: {path} has {len(bad_gold)} gold answers that are not right when scored against themselves; "
            "every response to them would be scored wrong. Correct or remove the lines, or choose to leave them out\n"
            + "\n".join(_listed(list(bad_gold.values())))
        )
    if not kept:
        raise ConfigError(
            f"data.train: no usable problem in {path}: {len(lines)} read, 0 kept; expected one JSON object a line, "
            f"like {SCHEMA}. Write such lines or point data.train to another file\n" + "\n".join(_listed(faults))
        )
    num_faulty = sum(fault.kind not in HARMLESS for fault in faults)
    if num_faulty > max_left_out * len(lines):
        raise ConfigError(
            f"data.train: {num_faulty} of the {len(lines)} problems in {path} have a fault, more than the share "
            f"data.max_left_out = {max_left_out:g} that may be left out. Correct or remove them, or raise "
            f"data.max_left_out to at least {math.ceil(num_faulty / len(lines) * 1e4) / 1e4:g}\n{report.summary()}"
        )
    return kept, report


def encode_problems(
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    max_prompt_tokens: int,
    prompt: PromptConfig = NO_PROMPT,
    strict: bool = False,
) -> tuple[list[tuple[Problem, tuple[int, ...]]], DataReport]:
    """The problems with their prompt ids, and a report on those whose prompt exceeds ``max_prompt_tokens``.

    Raises ``ConfigError`` for an overlong prompt when ``strict``, and when no problem is left.
    """
    encoded = list(encode_prompts(tokenizer, problems, prompt))
    kept = [(problem, ids) for problem, ids in encoded if len(ids) <= max_prompt_tokens]
    expected = f"tokens, expected at most data.max_prompt_tokens = {max_prompt_tokens}"
    faults = tuple(
        Fault(f"problem {problem.problem_id}", "prompt", "overlong_prompt", f"{len(ids)} {expected}")
        for problem, ids in encoded
        if len(ids) > max_prompt_tokens
    )
    if faults and (strict or not kept):
        raise ConfigError(
            f"data.max_prompt_tokens: {len(faults)} of {len(problems)} prompts are too long, {len(kept)} are left; "
            f"the longest has {max(len(ids) for _, ids in encoded)} tokens. Raise data.max_prompt_tokens or remove "
            "the problems\n" + "\n".join(_listed(faults))
        )
    return kept, DataReport(len(problems), len(kept), faults)


def load_training_data(
    config: Config, *, score: Score | None, tokenizer: Any
) -> tuple[list[tuple[Problem, tuple[int, ...]]], list[str]]:
    """What a run trains on, checked and encoded, and what to tell its user. Raises ``ConfigError`` as the parts do."""
    data = config.data
    problems, read = load_problems(
        data.train,
        score=score,
        strict=data.strict,
        max_left_out=data.max_left_out,
        skip_unparsable_gold=data.skip_unparsable_gold,
        answer_format=config.prompt.answer_format,
    )
    encoded, prompts = encode_problems(
        tokenizer,
        problems,
        max_prompt_tokens=data.max_prompt_tokens,
        prompt=config.prompt,
        strict=data.strict,
    )
    return encoded, [
        f"data: {data.train}: {read.summary()}",
        f"data: prompts of at most {data.max_prompt_tokens} tokens: {prompts.summary()}",
    ]


def _read_lines(path: Path) -> dict[int, str]:
    """``line number -> line`` of the lines that are not blank."""
    try:
        texts = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(read_lines(path)))
        return {number: text for number, text in enumerate(texts, 1) if text.strip()}
    except OSError as error:
        commands = how_to_make(path) if isinstance(error, FileNotFoundError) else ""
        remedy = f"fetch and prepare it with\n{commands}\nor " if commands else ""
        raise ConfigError(
            f"data.train: cannot read {path}: {error.strerror}; {remedy}give an existing JSON Lines file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.train: {path} is not UTF-8: {error}; write it again as UTF-8") from None


def _check_lines(lines: dict[int, str]) -> tuple[dict[int, Problem], list[Fault]]:
    """``line number -> problem`` of the lines without a fault. Of equal prompts the first stays."""
    problems: dict[int, Problem] = {}
    faults: list[Fault] = []
    first_with: dict[str, int] = {}
    for number, line in lines.items():
        checked = _check_line(f"line {number}", line)
        if isinstance(checked, Fault):
            faults.append(checked)
            continue
        first = first_with.setdefault(checked.prompt, number)
        if first == number:
            problems[number] = checked
            continue
        where = f"line {number}"
        if checked.answer == problems[first].answer:
            faults.append(Fault(where, "prompt", "duplicate", f"the prompt of line {first}, with the same answer"))
        else:
            faults.append(Fault(where, "answer", "conflicting", f"not the answer of line {first} to the same prompt"))
    return problems, faults


def _with_own_ids(problems: dict[int, Problem]) -> tuple[list[Problem], int]:
    """The problems, each with an id that no other has, and how many got a new one: the first with an id keeps it."""
    own: dict[str, Problem] = {}
    num_renamed = 0
    for line, problem in problems.items():
        name = problem.problem_id
        num_renamed += name in own
        while name in own:
            name += f"@{line}"
        own[name] = replace(problem, problem_id=name)
    return list(own.values()), num_renamed


def _check_line(where: str, line: str) -> Problem | Fault:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        return Fault(where, "(all)", "not_json", f"not JSON: {error}; found {line.strip()[:60]!r}")
    if not isinstance(record, dict):
        return _wrong_type(where, "(all)", f"a JSON object like {SCHEMA}", record)
    return check_record(where, record)


def check_record(where: str, record: dict[str, Any]) -> Problem | Fault:
    """The problem of a row, or what is wrong with it at ``where``."""
    for field in ("prompt", "answer"):
        if record.get(field) is None:
            return Fault(where, field, "missing", f"missing; the line has {sorted(record)}")
    prompt, answer, numbers = record["prompt"], record["answer"], record.get("numbers") or []
    problem_id, verifier, kind = record.get("id"), record.get("verifier", "math"), record.get("kind") or ""
    level = str(record["level"]) if _is_int(record.get("level")) else record.get("level") or ""
    if not isinstance(prompt, str):
        return _wrong_type(where, "prompt", "a string", prompt)
    if not isinstance(answer, str) and not _is_int(answer):
        return _wrong_type(where, "answer", "a string or an integer (one answer, exact)", answer)
    for field, text in (("prompt", prompt), ("answer", str(answer))):
        if not text.strip():
            return Fault(where, field, "empty", "empty")
    for field in ("prompt", "answer", "id", "kind", "level"):
        if re.search("[\ud800-\udfff]", text := str(record.get(field))):
            return Fault(where, field, "invalid", f"holds half of a surrogate pair, which is no text: {text[:60]!a}")
    if not isinstance(problem_id, str | None) and not _is_int(problem_id):
        return _wrong_type(where, "id", "a string", problem_id)
    if not isinstance(verifier, str) or verifier not in VERIFIERS:
        return Fault(where, "verifier", "invalid", f"expected one of {', '.join(VERIFIERS)}, found {verifier!r}")
    if not isinstance(numbers, list) or not all(_is_int(number) and number >= 0 for number in numbers):
        return _wrong_type(where, "numbers", "a list of integers, none negative", numbers)
    if not isinstance(kind, str):
        return _wrong_type(where, "kind", "a string, by which accuracy is reported", kind)
    if not isinstance(level, str):
        return _wrong_type(where, "level", "a string, the problem's difficulty", level)
    if verifier == "countdown":
        if not numbers:
            return Fault(where, "numbers", "missing", "missing; countdown needs the numbers to use")
        if not re.fullmatch(r"-?[0-9]+", str(answer).strip()):
            return Fault(where, "answer", "invalid", f"expected an integer target of countdown, found {answer!r}")
    name = where.removeprefix("line ") if problem_id is None else str(problem_id)
    return Problem(name, prompt, str(answer).strip(), verifier, tuple(numbers), kind, level)


def check_gold(problems: dict[int, Problem], score: Score, answer_format: str = "boxed") -> dict[int, Fault]:
    """``line number -> fault`` of the gold answers that are not right as a response. Countdown targets are integers."""
    asked = {line: problem for line, problem in problems.items() if problem.verifier != "countdown"}
    rewards = score([(problem, as_response(problem.answer, answer_format)) for problem in asked.values()])
    return {
        line: Fault(
            f"line {line}",
            "answer",
            "unparsable_gold",
            f"gold {problem.answer[:100]!r} scored against itself is {reward.outcome}, expected correct",
        )
        for (line, problem), reward in zip(asked.items(), rewards, strict=True)
        if reward.outcome != Outcome.CORRECT
    }


def _wrong_type(where: str, field: str, expected: str, found: object) -> Fault:
    message = f"expected {expected}, found {type(found).__name__} {str(found)[:60]!r}"
    return Fault(where, field, "wrong_type", message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(faults: Sequence[Fault]) -> list[str]:
    lines = [f"  {fault}"[:400] for fault in faults[:NUM_LISTED]]
    return lines + ([f"  ... and {len(faults) - NUM_LISTED} more"] if len(faults) > NUM_LISTED else [])

"""A curriculum file: the problems of a data set from certain to uncertain, in stages (SENT, arXiv 2512.04359).

JSON Lines, written by tools/semantic_entropy.py. The first line says how it was made:

    {"format": "semantic-entropy/1", "problems_sha256": ..., "num_problems": 3000, "stages": 2, ...}

and one line per problem, by ascending semantic entropy, ties in the order of the data:

    {"row": 17, "id": "p17", "stage": 0, "entropy": 0.5623, "clusters": [[0.75, 6, "2"], [0.25, 2, null]]}

``row`` counts the usable problems of the data from 0. A cluster is its share, its number of responses and its first
answer (null: no answer); tools/semantic_entropy.py says what an entropy is.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.data.sampler import DataOrder
from megatron_ext.files import first_fault, read_lines
from megatron_ext.types import Problem

FORMAT = "semantic-entropy/1"
MAKE = "megatron-entropy semantic-entropy RECIPE"


def data_order(config: Config, encoded: Sequence[tuple[Problem, Sequence[int]]]) -> DataOrder:
    """The order in which a run takes problems, given with the tokens of their prompts: stage by stage where there is a
    curriculum. Raises ConfigError."""
    problems = [problem for problem, _ in encoded]
    seed, identity = config.train.seed, _as_trained_on(encoded)
    if not config.data.curriculum:
        return DataOrder([range(len(problems))], seed=seed, problems=identity)
    stages = read_stages(config.data.curriculum, problems)
    return DataOrder(stages, seed=seed, starts=stage_starts(config, len(stages)), problems=identity)


def fingerprint(problems: Sequence[Problem]) -> str:
    """What identifies a data set here: its usable problems in their order."""
    content = [[problem.problem_id, problem.prompt, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _as_trained_on(encoded: Sequence[tuple[Problem, Sequence[int]]]) -> str:
    """What identifies the problems as the model reads them and the verifier judges them: a resumed run has the same."""
    digest = hashlib.sha256()
    for problem, ids in encoded:
        scored_by = [problem.problem_id, problem.answer, problem.verifier, problem.numbers, len(ids)]
        digest.update(json.dumps(scored_by, ensure_ascii=False).encode() + array("q", ids).tobytes())
    return digest.hexdigest()


def stage_of(rank: int, num_problems: int, num_stages: int) -> int:
    """The stage of the problem at ``rank`` (from 0) in ascending order: stages of equal size, up to one problem."""
    return rank * num_stages // num_problems


def read_stages(path: str | Path, problems: Sequence[Problem]) -> list[list[int]]:
    """The problems' numbers, stage by stage, ascending.

    Raises ConfigError when the file cannot be read or was made for other problems.
    """
    header, rows = _read(Path(path))
    if header.problems_sha256 != fingerprint(problems):
        raise ConfigError(
            f"data.curriculum: {path} is of another data set: {header.num_problems} problems with sha256 "
            f"{header.problems_sha256[:12]}, data.train has {len(problems)} usable ones with "
            f"{fingerprint(problems)[:12]}; {_difference(rows, problems)}. Make it anew with {MAKE} --out FILE"
        )
    stages: list[list[int]] = [[] for _ in range(header.stages)]
    for row in rows:
        stages[row.stage].append(row.row)
    if sorted(number for stage in stages for number in stage) != list(range(len(problems))) or not all(stages):
        raise ConfigError(
            f"data.curriculum: {path} has {len(rows)} rows in stages of {[len(stage) for stage in stages]}, expected "
            f"each of the {len(problems)} problems once and no empty stage. Make it anew with {MAKE} --out FILE"
        )
    return stages


def stage_starts(config: Config, num_stages: int) -> list[int]:
    """The first step of each stage: equal shares of ``train.steps``, or ``data.stage_starts``.

    Raises ConfigError when ``data.stage_starts`` does not fit the number of stages.
    """
    given = list(config.data.stage_starts)
    starts = [0, *given] if given else [-(-config.train.steps * stage // num_stages) for stage in range(num_stages)]
    if len(starts) != num_stages or starts != sorted(set(starts)):
        raise ConfigError(
            f"data.stage_starts: found {given}, expected {num_stages - 1} ascending steps after 0, where the stages "
            f"after the first of {num_stages} begin"
        )
    return starts


class _Header(BaseModel, strict=True):
    format: Literal["semantic-entropy/1"]
    problems_sha256: str
    num_problems: int
    stages: Annotated[int, Field(ge=1)]


class _Row(BaseModel, strict=True):
    row: int
    id: str
    stage: Annotated[int, Field(ge=0)]
    entropy: float


def _read(path: Path) -> tuple[_Header, list[_Row]]:
    try:
        first, *others = read_lines(path)
        header, rows = _Header.model_validate_json(first), [_Row.model_validate_json(line) for line in others]
    except OSError as error:
        raise ConfigError(
            f"data.curriculum: cannot read {path}: {error.strerror}; make it with {MAKE} --out {path}"
        ) from None
    except ValidationError as error:
        fault = first_fault(error)
    except ValueError:
        fault = "it is empty"
    else:
        last = max((row.stage for row in rows), default=0)
        if len(rows) == header.num_problems and last < header.stages <= len(rows):
            return header, rows
        fault = f"{len(rows)} rows for {header.num_problems} problems in {header.stages} stages"
    raise ConfigError(
        f"data.curriculum: {path} is not a whole curriculum of format {FORMAT}: {fault}; make it anew with {MAKE}"
    )


def _difference(rows: Sequence[_Row], problems: Sequence[Problem]) -> str:
    """A word on the ids that differ."""
    theirs, ours = {row.id for row in rows}, {problem.problem_id for problem in problems}
    only = [("only in the curriculum", sorted(theirs - ours)), ("only in the data", sorted(ours - theirs))]
    words = [f"{len(ids)} ids {where}, such as {ids[0]!r}" for where, ids in only if ids]
    return " and ".join(words) or "the ids are the same, prompts, answers or their order differ"

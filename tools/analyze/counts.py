"""How often each problem was solved, from evaluations, samples files or the evaluation in a run's folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_ext.config.errors import ConfigError
from megatron_ext.files import first_fault

from ..report.data import EVALUATION, Evaluation, Record, read_evaluations, read_json
from .inputs import Problems, by_problem, kind_of, labels_of, read_problems, read_samples


@dataclass(frozen=True)
class Solved:
    """``c`` of ``n`` responses to a problem were right; ``majority``: so was the vote, None where it is unknown."""

    set: str
    id: str
    n: int
    c: int
    kind: str = ""
    level: str = ""
    prompt: str = ""
    answer: str = ""
    majority: bool | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.set, self.id

    @property
    def accuracy(self) -> float:
        return self.c / self.n


class SuiteModel(Record):
    """A model's evaluations in the result of a suite, by set."""

    sets: dict[str, Evaluation]


SUITE = TypeAdapter(dict[str, SuiteModel])


@dataclass(frozen=True)
class Counts:
    """One model's problems, and where they come from."""

    label: str
    rows: list[Solved]
    origin: str

    def of_set(self, name: str) -> list[Solved]:
        return [row for row in self.rows if row.set == name]

    def described(self) -> dict[str, Any]:
        return {"origin": self.origin, "problems": len(self.rows), "responses": sum(row.n for row in self.rows)}


def counted(options: argparse.Namespace) -> list[Counts]:
    """One or, of evaluations with several labels, more for each input, in order. Raises ConfigError."""
    problems = read_problems(options.data)
    kinds = [kind_of(path) for path in options.inputs]
    names = labels_of(options.inputs, ())
    found: list[Counts] = []
    for path, kind, name in zip(options.inputs, kinds, names, strict=True):
        if kind == "model":
            raise ConfigError(f"{path}: a model has no answers; give its samples (.jsonl) or its evaluation (.json)")
        if kind == "samples":
            found.append(_of_samples(path, name, problems, options.limit))
        else:
            file = path / EVALUATION if kind == "run" else path
            each = _of_evaluation(file, problems, options.limit)
            found += [replace(one, label=f"{name}: {one.label}") for one in each] if len(names) > 1 else each
    if options.labels:
        labels = labels_of([Path(str(number)) for number in range(len(found))], options.labels)
        found = [replace(one, label=label) for one, label in zip(found, labels, strict=True)]
    return found


def sets_of(counts: Sequence[Counts]) -> list[str]:
    """The sets of all, in the order of their first problem."""
    return list(dict.fromkeys(row.set for each in counts for row in each.rows))


def paired(first: Counts, second: Counts) -> list[tuple[Solved, Solved]]:
    """The problems that both have. Raises ConfigError where there is none, or one that reads otherwise."""
    others = {row.key: row for row in second.rows}
    pairs = [(row, others[row.key]) for row in first.rows if row.key in others]
    if not pairs:
        raise ConfigError(
            f"{first.label} and {second.label} have no problem in common: found sets {', '.join(sets_of([first]))} and "
            f"{', '.join(sets_of([second]))}; expected answers to the same problems"
        )
    for a, b in pairs:
        if a.prompt and b.prompt and a.prompt != b.prompt:
            raise ConfigError(
                f"problem {a.id} of set {a.set} is another one to {first.label} ({a.prompt[:60]!r}) than to "
                f"{second.label} ({b.prompt[:60]!r}): they are of different data, and cannot be paired"
            )
    return pairs


def _of_samples(path: Path, label: str, problems: Problems, limit: int | None) -> Counts:
    rows = read_samples(path, limit=limit)
    unscored = [row for row in rows if row.is_correct is None]
    if unscored:
        raise ConfigError(
            f"--samples: {path}: {len(unscored)} of {len(rows)} responses say neither correct nor outcome; expected "
            "scored samples, as evaluate writes them"
        )
    found = []
    problems = problems.of_samples(row.set for row in rows)
    for (name, problem_id), responses in by_problem(rows).items():
        solved = Solved(name, problem_id, len(responses), sum(bool(row.is_correct) for row in responses))
        problem = problems.find(solved.key)
        if problem is not None:
            solved = replace(
                solved,
                kind=problem.kind or problem.verifier,
                level=problem.level,
                prompt=problem.prompt,
                answer=problem.answer,
            )
        found.append(solved)
    return Counts(label, found, f"samples {path}")


def _of_evaluation(path: Path, problems: Problems, limit: int | None) -> list[Counts]:
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; evaluate the run with --out {path}")
        whole = read_json(path)
        if isinstance(whole, dict) and "suite" in whole and "models" in whole:
            models = SUITE.validate_python(whole["models"])
        else:
            evaluations = read_evaluations(path)
            models = {label: SuiteModel(sets={Path(each.data.path).stem: each}) for label, each in evaluations.items()}
    except ValidationError as error:
        raise ConfigError(f"{path}: not the result of a suite: {first_fault(error)}; evaluate it again") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return [
        Counts(
            label,
            [
                row
                for name, each in model.sets.items()
                for row in _of_one(name, each, problems.of_samples(model.sets), limit)
            ],
            f"evaluation {label} of {path}",
        )
        for label, model in models.items()
    ]


def _of_one(name: str, evaluation: Evaluation, problems: Problems, limit: int | None) -> list[Solved]:
    found = []
    for row in evaluation.problems[:limit]:
        problem = problems.find((name, row.id))
        level = row.level or (problem.level if problem else "")
        found.append(Solved(name, row.id, row.n, row.c, row.kind, level, row.prompt, row.answer, majority=row.majority))
    return found

"""From scored responses to numbers with intervals, and the file that keeps them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.config.errors import ConfigError
from megatron_ext.files import LARGE_BYTES, read_json, write_atomically
from megatron_ext.metrics.eval_stats import CONFIDENCE, bootstrap, per_problem

from .responses import REFLECTIVE, Response

if TYPE_CHECKING:
    from megatron_ext.types import Problem

RESPONSE = ("length", "truncated", "loop", "repeated", "reflective")  # of each row: means over its responses


def problem_row(problem: Problem, responses: Sequence[Response], winner: int | None) -> dict[str, Any]:
    """What is kept of one problem. ``winner``: the response that gave the majority's answer first."""
    n = len(responses)
    sides = {name: [r.length for r in responses if r.correct is right] for name, right in _SIDES.items()}
    return {
        "id": problem.problem_id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "kind": problem.kind or problem.verifier,
        "level": problem.level,
        "n": n,
        "c": sum(r.correct for r in responses),
        "majority": winner is not None and responses[winner].correct,
        "majority_answer": None if winner is None else responses[winner].extracted,
        "length": sum(r.length for r in responses) / n,
        **{f"length_{name}": fmean(lengths) if lengths else None for name, lengths in sides.items()},
        "truncated": sum(r.truncated for r in responses) / n,
        "loop": sum(r.loop for r in responses) / n,
        "repeated": sum(r.repeated for r in responses) / n,
        "reflective": sum(sum(r.reflective.values()) for r in responses) / n,
    }


_SIDES = {"correct": True, "wrong": False}


def results(rows: Sequence[dict[str, Any]], responses: Sequence[Sequence[Response]], ks: Sequence[int]) -> dict:
    """Everything that an evaluation reports of its responses."""
    every = [response for row in responses for response in row]
    outcomes = Counter(str(response.outcome) for response in every)
    words = {name: sum(r.reflective[name] for r in every) / len(every) for name in REFLECTIVE}
    sides = {name: [r.length for r in every if r.correct is right] for name, right in _SIDES.items()}
    return {
        "num_problems": len(rows),
        "confidence": CONFIDENCE,
        **summary(rows, ks),
        "length_of": {name: {"mean": fmean(of) if of else None, "responses": len(of)} for name, of in sides.items()},
        "reflective_words": words,
        "accuracy": {key: accuracy_by(rows, key) for key in ("kind", "level")},
        "outcomes": {name: count / len(every) for name, count in outcomes.most_common()},
    }


def summary(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """``metrics`` and ``response`` with intervals over problems, from the rows per problem."""
    columns = per_problem(rows, ks)
    response = {name: [float(row[name]) for row in rows] for name in RESPONSE if name in rows[0]}
    everything = {**columns, **response}
    intervals = bootstrap(np.array(list(everything.values())).T)
    found = {name: asdict(interval) for name, interval in zip(everything, intervals, strict=True)}
    return {"metrics": {name: found[name] for name in columns}, "response": {name: found[name] for name in response}}


def accuracy_by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """``c / n`` of the problems of each kind or level with its interval, in the order of the names."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row[key]:
            groups.setdefault(row[key], []).append(row["c"] / row["n"])
    found = {}
    for name in sorted(groups, key=lambda name: (len(name), name) if name.isdecimal() else (0, name)):
        (interval,) = bootstrap(np.array(groups[name])[:, None])
        found[name] = {"problems": len(groups[name]), **asdict(interval)}
    return found


def load_evaluations(path: str | Path) -> dict[str, dict[str, Any]]:
    """``label -> evaluation`` of a file written by this tool. Raises ConfigError for any other file."""
    try:
        found = read_json(path, max_bytes=LARGE_BYTES)
    except (ValueError, OSError):
        found = None
    evaluations = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(item, dict) and {"metrics", "problems"} <= item.keys() for item in evaluations):
        raise ConfigError(
            f"{path}: expected labels with evaluations as written by megatron-entropy evaluate; remove or rename it"
        )
    return found  # type: ignore[return-value]


def save_evaluation(path: str | Path, label: str, evaluation: dict[str, Any]) -> None:
    """Add or replace one label; the file is always whole."""
    target = Path(path)
    write_json(target, (load_evaluations(target) if target.exists() else {}) | {label: evaluation})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """In the place of what is there, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

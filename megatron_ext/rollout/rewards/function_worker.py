"""The worker that runs a user's reward function: one JSON line in, one out. No torch, unless the function imports it.

The first line says which function and with which options. What the function prints goes to standard error.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import replace
from typing import Any

from megatron_ext.plugins import load
from megatron_ext.records import Problem, Response, Reward
from megatron_ext.rollout.rewards import worker
from megatron_ext.rollout.rewards.outcome import Outcome


def main() -> None:
    replies = worker.open_replies()
    spec, options = json.loads(sys.stdin.readline())
    function = load(spec, key="reward.function")
    with open("/proc/self/statm") as file:
        imported = int(file.read().split()[0]) * resource.getpagesize()
    worker.limit_memory(imported + worker.MAX_WORKER_BYTES)

    def reply(line: str) -> str:
        problem, response = json.loads(line)
        return json.dumps(scored(function, _problem(problem), _response(response), options))

    worker.serve(replies, reply)


def scored(function: Any, problem: Problem, response: Response, options: dict[str, Any]) -> list[Any]:
    """Value, outcome and extracted answer; the outcome is None where the function gives a number alone."""
    try:
        found = function(problem, response, **options)
        value, outcome, extracted = (
            (found.value, found.outcome, found.extracted) if isinstance(found, Reward) else (found, None, None)
        )
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"returned {found!r}, expected a finite number or a Reward")
        if outcome is not None and not isinstance(outcome, str) or not isinstance(extracted, str | None):
            raise TypeError(f"returned {found!r}, expected words for outcome and extracted")
        return [float(value), outcome, extracted]
    except Exception as error:  # a user's function may raise anything: it costs one reward
        return [0.0, Outcome.ERROR, f"{type(error).__name__}: {error}"[:1000]]


def _problem(fields: list[Any]) -> Problem:
    """From the values of its fields; JSON has made lists of tuples."""
    problem = Problem(*fields)
    return replace(problem, numbers=tuple(problem.numbers))


def _response(fields: list[Any]) -> Response:
    response = Response(*fields)
    return replace(response, token_ids=tuple(response.token_ids))


if __name__ == "__main__":
    main()

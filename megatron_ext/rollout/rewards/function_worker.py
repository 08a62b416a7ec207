"""The worker that runs a user's reward function: one JSON line in, one out. No torch, unless the function imports it.

The first line says which function and with which options; ``argv[1]``: seconds after which a process that nobody
killed (its parent is dead) ends itself. What the function prints goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from dataclasses import replace
from typing import Any

from megatron_ext.plugins import load
from megatron_ext.records import Problem, Response, Reward
from megatron_ext.rollout.rewards.verify import MAX_WORKER_BYTES, READY, Outcome


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the function prints must not reach the replies
    for notice in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # for the trainer, as in verify.py
        signal.signal(notice, signal.SIG_IGN)
    spec, options = json.loads(sys.stdin.readline())
    function = load(spec, key="reward.function")
    with open("/proc/self/statm") as file:  # beside what the function has imported
        limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_WORKER_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(hard, limit), hard))
    print(READY, file=replies)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        problem, response = json.loads(line)
        reply = scored(function, _problem(problem), _response(response), options)
        signal.alarm(0)
        print(json.dumps(reply), file=replies)


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

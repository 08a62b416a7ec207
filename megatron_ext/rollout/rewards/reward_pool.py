"""Rewards: a pool of processes that score answers and can be killed (rollout/rewards/verify.py is what they run).

A worker is a child process that answers one question at a time over pipes. At the deadline it gets SIGKILL,
which no C call defeats, and a fresh one takes over; the other answers are not touched. Workers are started by
``exec``, not forked and not through ``multiprocessing``: a trainer with threads must not be forked, and
``multiprocessing`` would import the trainer's main module, and with it torch, into every worker.

A verifier that has gone wrong must stop the run, not score it 0: every worker scores known answers before
each batch, and too large a share of answers without a verdict is an error.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megatron_ext import heartbeat
from megatron_ext.rollout.rewards import verify
from megatron_ext.rollout.rewards.verify import Outcome
from megatron_ext.types import Problem, Reward

START_S = 120.0  # to import SymPy, or to score a known answer, on a busy machine
MIN_ANSWERS_TO_TRIP = 20
NO_VERDICT = (Outcome.TIMEOUT, Outcome.CRASHED)
WORKER_SCRIPT = Path(verify.__file__)
INHERITED = (  # of the environment, by a worker: how to find Python and its packages, no secrets
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV"),
    *("HOME", "TMPDIR", "LANG", "LC_ALL", "TZ"),
)


def inherited() -> dict[str, str]:
    """The environment of a process that reads what is not trusted."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


class VerifierError(RuntimeError):
    """Rewards can no longer be trusted: the run must stop. Exit code 3."""


class Question(NamedTuple):
    """What a worker is asked. Equal questions are asked once."""

    extracted: str
    answer: str
    verifier: str = "math"
    numbers: tuple[int, ...] = ()


CANARIES: tuple[tuple[Question, Outcome], ...] = (
    (Question("42", "42"), Outcome.CORRECT),
    (Question("41", "42"), Outcome.WRONG),
    (Question("-7", "7"), Outcome.WRONG),
    (Question(r"\frac{2}{4}", "0.5"), Outcome.CORRECT),
    (Question(r"\frac{1}{3}", "0.5"), Outcome.WRONG),
    (Question(r"2\sqrt{2}", r"\sqrt{8}"), Outcome.CORRECT),
    (Question("x^2+2x+1", "(x+1)^2"), Outcome.CORRECT),
    (Question("x^2+2x+2", "(x+1)^2"), Outcome.WRONG),
    (Question(r"\{2,1\}", "1,2"), Outcome.CORRECT),
    (Question("(1,2]", "[1,2]"), Outcome.WRONG),
    (Question("1=2=3=4", "4"), Outcome.CONTRADICTION),
    (Question("x+1=4", "4"), Outcome.WRONG),
    (Question(r"4\approx 5", "4"), Outcome.UNPARSABLE),
    (Question("3^{-100}", "2^{-100}"), Outcome.WRONG),
    (Question("(1+2)*3", "9", "countdown", (3, 2, 1)), Outcome.CORRECT),
    (Question("3*3", "9", "countdown", (3, 2, 1)), Outcome.WRONG_NUMBERS),
    (Question("(1+3)*2", "9", "countdown", (3, 2, 1)), Outcome.WRONG),
)


class RewardPool:
    """Judges batches of responses on ``workers`` processes (0: one per core, at most 16).

    ``deadline_s`` is for one answer. ``correct`` and ``wrong`` are the rewards. Usable from any thread, one
    batch at a time; a context manager, whose exit ends the processes.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        deadline_s: float = 10.0,
        max_timeout_share: float = 0.2,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        self.deadline_s, self.max_timeout_share = deadline_s, max_timeout_share
        self.correct, self.wrong = correct, wrong
        self._workers = [
            _Worker(max(deadline_s, START_S) + 5) for _ in range(workers or min(16, len(os.sched_getaffinity(0))))
        ]
        self._one_batch = threading.Lock()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._one_batch:
            while self._workers:
                self._workers.pop().stop()

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
        """The reward of each ``(problem, response)``, in order.

        Raises ``VerifierError`` when a worker gets a known answer wrong, when workers cannot be started, or
        when more than ``max_timeout_share`` of at least 20 answers got no verdict.
        """
        questions = [_question(problem, response) for problem, response in answers]
        copies = Counter(question for question in questions if question is not None)
        outcomes: dict[Question | None, Outcome] = {None: Outcome.NO_ANSWER, **self._ask_all(copies, len(answers))}
        return [self._reward(question, outcomes[question]) for question in questions]

    def check_canaries(self) -> None:
        """Have every worker score the known answers. Raises ``VerifierError``. ``score`` does it by itself."""
        self._ask_all(Counter(), 0)

    def _reward(self, question: Question | None, outcome: Outcome) -> Reward:
        value = self.correct if outcome is Outcome.CORRECT else self.wrong
        return Reward(value, outcome.value, None if question is None else question.extracted)

    def _ask_all(self, copies: Counter[Question], num_answers: int) -> dict[Question, Outcome]:
        """``copies`` counts the answers that share a question; ``num_answers`` are the batch's, boxless ones too."""
        pending, outcomes = deque(copies), {}

        def work(worker: _Worker) -> None:
            try:
                _check(worker)
                while pending:
                    try:
                        question = pending.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    outcomes[question] = worker.score(question, self.deadline_s)
                    heartbeat.progress()
                    if outcomes[question] in NO_VERDICT:
                        self._check_breaker(dict(outcomes), copies, num_answers)
            except BaseException:
                pending.clear()
                raise

        with self._one_batch:
            if not self._workers:
                raise ValueError("RewardPool: the pool is closed; score inside its with-block")
            with ThreadPoolExecutor(len(self._workers)) as threads:
                try:
                    list(threads.map(work, self._workers))
                finally:
                    pending.clear()  # an interrupt of this thread: the others end after their current answer
        return outcomes

    def _check_breaker(self, outcomes: dict[Question, Outcome], copies: Counter[Question], num_answers: int) -> None:
        lost = {question: outcome for question, outcome in outcomes.items() if outcome in NO_VERDICT}
        num_lost = sum(copies[question] for question in lost)
        if num_answers >= MIN_ANSWERS_TO_TRIP and num_lost > self.max_timeout_share * num_answers:
            question, outcome = next(iter(lost.items()))
            raise VerifierError(
                f"reward: at least {num_lost} of {num_answers} answers got no verdict, expected at most a share of "
                f"reward.max_timeout_share = {self.max_timeout_share}; one of them: {outcome.value}, answer "
                f"{question.extracted[:200]!r} to gold {question.answer[:200]!r}. If the machine is overloaded lower "
                "reward.workers or raise reward.deadline_s; otherwise look at what the policy writes"
            )


def outcome_counts(rewards: Sequence[Reward]) -> dict[str, int]:
    """How many rewards have each outcome: every ``Outcome`` is a key, zeros included."""
    counts = Counter(reward.outcome for reward in rewards)
    return {outcome.value: counts[outcome.value] for outcome in Outcome}


def _question(problem: Problem, response: str) -> Question | None:
    extracted = verify.extract(response)
    if extracted is None:
        return None
    # one character beyond the limit is enough to be scored too long
    short = extracted[: verify.MAX_ANSWER_CHARS + 1]
    return Question(short, problem.answer, problem.verifier, problem.numbers)


def _check(worker: _Worker) -> None:
    for question, expected in CANARIES:
        found = worker.score(question, START_S)
        if found is not expected:
            raise VerifierError(
                f"reward: the verifier gives a known answer the wrong outcome: {question.extracted!r} to gold "
                f"{question.answer!r} ({question.verifier}), found {found.value}, expected {expected.value}. "
                "Compare the installed math-verify, latex2sympy2_extended and sympy with the pinned versions"
            )


class _Worker:
    """One killable process. Not thread-safe: a batch gives it to one thread.

    After ``orphan_s`` seconds with one question, longer than anybody waits, the process ends itself.
    """

    def __init__(self, orphan_s: float) -> None:
        self._orphan_s = math.ceil(orphan_s)
        self._launch()

    def score(self, question: Question, deadline_s: float) -> Outcome:
        """The outcome, after at most the deadline and, for a worker that died, one more try on a fresh one."""
        line = json.dumps(question).encode() + b"\n"
        for _ in range(2):  # something else may have killed it: only the second death is the answer's fault
            self._wait_until_ready()
            try:
                self._stdin.write(line)
                return Outcome(self._read_line(deadline_s))
            except TimeoutError:
                self._replace()
                return Outcome.TIMEOUT
            except (EOFError, BrokenPipeError):
                self._replace()
        return Outcome.CRASHED

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()

    def _replace(self) -> None:
        self.stop()
        self._launch()

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER_SCRIPT), str(self._orphan_s)],  # -P: rollout/ is no place to import from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the LaTeX parser complains there about every bad answer
            bufsize=0,
            env=inherited() | verify.WORKER_ENVIRONMENT,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._ready = False

    def _wait_until_ready(self) -> None:
        for _ in range(2):
            if self._ready:
                return
            try:
                self._ready = self._read_line(START_S) == verify.READY
            except (EOFError, TimeoutError):
                self._replace()
        if not self._ready:
            command = f"{sys.executable} -P {WORKER_SCRIPT} 10 < /dev/null"
            raise VerifierError(
                f"reward: a verifier process did not start, twice; expected it to say {verify.READY!r} within "
                f"{START_S:.0f} s. See why with: {command}"
            )

    def _read_line(self, timeout_s: float) -> str:
        """Raises ``TimeoutError`` after ``timeout_s`` and ``EOFError`` when the process is dead."""
        end, line = time.monotonic() + timeout_s, b""
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise TimeoutError
            received = os.read(self._stdout.fileno(), 4096)
            if not received:
                raise EOFError
            line += received
        return line.decode().strip()

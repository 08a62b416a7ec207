"""Processes that score responses and can be killed: what the pools of the verifier and of a user's function share.

A worker is a child process that answers one question at a time over pipes. At the deadline it gets SIGKILL,
which no C call defeats, and a fresh one takes over; the other answers are not touched. Workers are started by
``exec``, not forked and not through ``multiprocessing``: a trainer with threads must not be forked, and
``multiprocessing`` would import the trainer's main module, and with it torch, into every worker.

A batch's answers may come one after the other, as an engine finishes them: each is scored at once, beside what the
caller does. Equal questions are asked once, and what a question's reply is depends on no order.

What scores must not go wrong unseen: too large a share of answers without a verdict is an error.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING, Generic, Self, TypeVar

from megatron_ext import heartbeat
from megatron_ext.records import Problem, Reward
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.rollout.rewards.worker import READY, WORKER_ENVIRONMENT

if TYPE_CHECKING:
    from megatron_ext.types import Sample

START_S = 120.0  # to import SymPy, or to score a known answer, on a busy machine
CHECK_EVERY_S = 60.0  # at most, between known answers of one worker
MIN_ANSWERS_TO_TRIP = 20
CLOSED = "RewardPool: the pool is closed; score inside its with-block"
NO_VERDICT = (Outcome.TIMEOUT, Outcome.CRASHED, Outcome.ERROR)
INHERITED = (  # of the environment, by a worker: how to find Python and its packages, no secrets
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "VIRTUAL_ENV"),
    *("HOME", "TMPDIR", "LANG", "LC_ALL", "TZ"),
)
Question = TypeVar("Question", bound=Hashable)


def inherited() -> dict[str, str]:
    """The environment of a process that reads what is not trusted."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


class VerifierError(RuntimeError):
    """Rewards can no longer be trusted: the run must stop. Exit code 3."""


@dataclass(frozen=True)
class Program:
    """What a worker runs. Its last argument, appended, are the seconds after which an orphan ends itself."""

    command: tuple[str, ...]
    environment: dict[str, str]
    greeting: str = ""  # what it reads first, a line

    @classmethod
    def of_module(cls, module: str, *, greeting: str = "") -> Self:
        """A module's ``main``, which finds what this process finds, and nothing in its directory (``-P``)."""
        path = os.pathsep.join(filter(None, sys.path))
        return cls((sys.executable, "-P", "-m", module), WORKER_ENVIRONMENT | {"PYTHONPATH": path}, greeting)


class WorkerPool(Generic[Question]):
    """Asks ``workers`` processes (0: one per core, at most 16).

    ``deadline_s`` is for one answer. Usable from any thread, one batch at a time; a context manager, whose exit ends
    the processes, and with them a batch of another thread.
    """

    def __init__(self, program: Program, workers: int, *, deadline_s: float, max_timeout_share: float) -> None:
        self.deadline_s, self.max_timeout_share = deadline_s, max_timeout_share
        orphan_s = max(deadline_s, START_S) + 5
        self._workers = [Worker(program, orphan_s) for _ in range(workers or min(16, len(os.sched_getaffinity(0))))]
        self._one_batch = threading.Lock()
        self._batch: QuestionBatch[Question] | None = None  # that is being scored
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. A batch that another thread is still having scored is not waited for: it gets an error."""
        self._is_closed = True
        if self._one_batch.acquire(blocking=False):
            self._stop_all()
            self._one_batch.release()
        elif (batch := self._batch) is not None:
            batch.end(ValueError(CLOSED))
            for worker in self._workers:
                worker.kill()
        else:  # the batch has just ended
            with self._one_batch:
                self._stop_all()

    def _stop_all(self) -> None:
        while self._workers:
            self._workers.pop().stop()

    def check(self, worker: Worker) -> None:
        """Before a process's first question, and its first in a batch after ``CHECK_EVERY_S``. Raises
        ``VerifierError``."""

    def outcome(self, reply: str) -> Outcome:
        """Of a worker's reply."""
        raise NotImplementedError

    def described(self, question: Question, reply: str) -> str:
        """A question that got no verdict, for the error."""
        raise NotImplementedError

    def question(self, problem: Problem, sample: Sample) -> Question | None:
        """What a worker is asked about a response of an engine; None where it need not be asked."""
        raise NotImplementedError

    def reward(self, question: Question | None, reply: str) -> Reward:
        """``reply`` means nothing where there is no question."""
        raise NotImplementedError

    def score_samples(self, samples: Sequence[tuple[Problem, Sample]]) -> list[Reward]:
        """The reward of each response of an engine, in order. Raises ``VerifierError`` as ``ask_all`` does."""
        with self.scoring(len(samples)) as scoring:
            return scoring.score_samples(samples)

    @contextmanager
    def scoring(self, num_answers: int, replies: dict[Question, str] | None = None) -> Iterator[Scoring[Question]]:
        """Score ``num_answers`` responses of an engine as they come; ``replies`` as in ``asking``."""
        with self.asking(num_answers, replies) as batch:
            yield Scoring(self, batch)

    def ask_all(self, copies: Counter[Question], num_answers: int) -> dict[Question, str]:
        """The reply to each question. ``copies`` counts the answers that share one; ``num_answers`` are the batch's,
        those that need not be asked too.

        Raises ``VerifierError`` as ``check`` does, when workers cannot be started, and when more than
        ``max_timeout_share`` of at least 20 answers got no verdict.
        """
        with self.asking(num_answers) as batch:
            return batch.replies_to(copies)

    @contextmanager
    def asking(self, num_answers: int, replies: dict[Question, str] | None = None) -> Iterator[QuestionBatch[Question]]:
        """A batch of ``num_answers`` that are asked as they come, by all workers. What ``replies`` holds is not asked
        again; the batch's are put there. Raises what ``ask_all`` does."""
        batch = QuestionBatch(self, num_answers, {} if replies is None else replies)
        with self._one_batch:
            if self._is_closed or not self._workers:
                raise ValueError(CLOSED)
            self._batch = batch
            try:
                with ThreadPoolExecutor(len(self._workers)) as threads:
                    for worker in self._workers:
                        threads.submit(batch.work, worker)
                    try:
                        yield batch
                    finally:
                        batch.end()  # also at an interrupt of this thread: the others end after their current answer
            finally:
                if self._is_closed:
                    self._stop_all()
                self._batch = None
        batch.raise_error()

    def check_when_due(self, worker: Worker) -> None:
        """``check``, unless the process has passed it within ``CHECK_EVERY_S``."""
        if time.monotonic() >= worker.check_due:
            self.check(worker)
            worker.check_due = time.monotonic() + CHECK_EVERY_S

    def check_breaker(self, replies: dict[Question, str], copies: Counter[Question], num_answers: int) -> None:
        """Raises ``VerifierError`` where too many of the answers that ``copies`` counts got no verdict."""
        lost = {q: replies[q] for q in copies if q in replies and self.outcome(replies[q]) in NO_VERDICT}
        num_lost = sum(copies[question] for question in lost)
        if num_answers >= MIN_ANSWERS_TO_TRIP and num_lost > self.max_timeout_share * num_answers:
            question, reply = next(iter(lost.items()))
            raise VerifierError(
                f"reward: at least {num_lost} of {num_answers} answers got no verdict, expected at most a share of "
                f"reward.max_timeout_share = {self.max_timeout_share}; one of them: {self.described(question, reply)}"
            )


class QuestionBatch(Generic[Question]):
    """Questions that workers answer while more come in; equal ones once. ``work`` runs in a thread for each worker."""

    def __init__(self, pool: WorkerPool[Question], num_answers: int, replies: dict[Question, str]) -> None:
        self._pool, self._num_answers, self._replies = pool, num_answers, replies
        self._copies: Counter[Question] = Counter()  # the answers that share a question
        self._asked: set[Question] = set(replies)
        self._pending: deque[Question] = deque()
        self._changed = threading.Condition()
        self._is_over, self._error = False, None

    def ask(self, questions: Iterable[Question]) -> None:
        """Have them answered from now on. ``replies_to`` is told of all answers that count, these too."""
        with self._changed:
            self._add(Counter(questions))

    def replies_to(self, copies: Counter[Question]) -> dict[Question, str]:
        """The replies, once all are there. ``copies`` counts the whole batch's answers that share a question."""
        with self._changed:
            self._copies.clear()
            self._add(copies)
            self._pool.check_breaker(self._replies, self._copies, self._num_answers)
            self._changed.wait_for(lambda: self._error is not None or len(self._replies) == len(self._asked))
        self.raise_error()
        return self._replies

    def reply(self, question: Question) -> str | None:
        """The reply, if it is there already."""
        return self._replies.get(question)

    def work(self, worker: Worker) -> None:
        try:
            self._pool.check_when_due(worker)
            while (question := self._next()) is not None:
                self._pool.check_when_due(worker)
                reply = worker.ask(question, self._pool.deadline_s)
                heartbeat.progress()
                with self._changed:
                    self._replies[question] = reply
                    if self._pool.outcome(reply) in NO_VERDICT:
                        self._pool.check_breaker(self._replies, self._copies, self._num_answers)
                    self._changed.notify_all()
        except BaseException as error:
            self.end(error)

    def end(self, error: BaseException | None = None) -> None:
        """The workers stop after their current answers."""
        with self._changed:
            self._is_over, self._error = True, self._error or error
            self._pending.clear()
            self._changed.notify_all()

    def raise_error(self) -> None:
        """What ended a worker, if something did."""
        if self._error is not None:
            raise self._error

    def _add(self, copies: Counter[Question]) -> None:
        self._copies.update(copies)
        new = [question for question in copies if question not in self._asked]
        self._asked.update(new)
        self._pending.extend(new)
        self._changed.notify_all()

    def _next(self) -> Question | None:
        """The next question, once there is one; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or bool(self._pending))
            return self._pending.popleft() if self._pending else None


class Scoring(Generic[Question]):
    """Responses of an engine that are scored while others are still generated."""

    def __init__(self, pool: WorkerPool[Question], batch: QuestionBatch[Question]) -> None:
        self._pool, self._batch = pool, batch

    def submit(self, samples: Iterable[tuple[Problem, Sample]]) -> None:
        """Responses that are finished; ``score_samples`` is given those that count, in order."""
        self._batch.ask(q for each in samples if (q := self._pool.question(*each)) is not None)

    def look_up(self, problem: Problem, sample: Sample) -> Reward | None:
        """The reward of a response that was submitted, if it is known already. From any thread."""
        question = self._pool.question(problem, sample)
        reply = "" if question is None else self._batch.reply(question)
        return None if reply is None else self._pool.reward(question, reply)

    def score_samples(self, samples: Sequence[tuple[Problem, Sample]]) -> list[Reward]:
        """The reward of each response, in order, once it is known; it depends on no order of ``submit``."""
        questions = [self._pool.question(problem, sample) for problem, sample in samples]
        replies = self._batch.replies_to(Counter(question for question in questions if question is not None))
        return [self._pool.reward(q, "" if q is None else replies[q]) for q in questions]


class Worker:
    """One killable process. Not thread-safe: a batch gives it to one thread.

    After ``orphan_s`` seconds with one question, longer than anybody waits, the process ends itself.
    ``check_due`` is when it has to score known answers again; a new process at once.
    """

    check_due: float

    def __init__(self, program: Program, orphan_s: float) -> None:
        self._program, self._orphan_s = program, math.ceil(orphan_s)
        self._is_killed, self._replacing = False, threading.Lock()
        self._launch()

    def ask(self, question: Hashable, deadline_s: float) -> str:
        """The reply to a question, which travels as JSON, after at most the deadline and, for a worker that died, one
        more try on a fresh one."""
        line = json.dumps(question).encode() + b"\n"
        for _ in range(2):  # something else may have killed it: only the second death is the answer's fault
            self._wait_until_ready()
            end = time.monotonic() + deadline_s
            try:
                self._write(line, end)
                return self._read_line(end)
            except TimeoutError:
                self._replace()
                return Outcome.TIMEOUT
            except (EOFError, BrokenPipeError):
                self._replace()
        return Outcome.CRASHED

    def stop(self) -> None:
        self._end()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()

    def kill(self) -> None:
        """End it, and have no other in its place; from any thread. Whoever waits for its answer gets an error."""
        with self._replacing:
            self._is_killed = True
            self._end()

    def _end(self) -> None:
        """SIGKILL to it and to what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _replace(self) -> None:
        with self._replacing:
            self.stop()
            if self._is_killed:
                raise ValueError(CLOSED)
            self._launch()

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            [*self._program.command, str(self._orphan_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the LaTeX parser complains there about every bad answer
            bufsize=0,
            env=inherited() | self._program.environment,
            start_new_session=True,  # a group of its own
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._ready, self.check_due = False, -math.inf
        if self._program.greeting:
            with suppress(BrokenPipeError):  # it ended at once: that shows when it is not ready
                self._stdin.write(self._program.greeting.encode() + b"\n")
        os.set_blocking(self._stdin.fileno(), False)

    def _wait_until_ready(self) -> None:
        for _ in range(2):
            if self._ready:
                return
            try:
                self._ready = self._read_line(time.monotonic() + START_S) == READY
            except (EOFError, TimeoutError):
                self._replace()
        if not self._ready:
            command = f"{' '.join(self._program.command)} 10 < /dev/null"
            raise VerifierError(
                f"reward: a verifier process did not start, twice; expected it to say {READY!r} within "
                f"{START_S:.0f} s. See why with: {command}"
            )

    def _write(self, line: bytes, end: float) -> None:
        """Raises ``TimeoutError`` at ``end``, and ``BrokenPipeError`` when the process is dead."""
        while line:
            _wait_for(self._stdin, select.POLLOUT, end)
            line = line[os.write(self._stdin.fileno(), line[: select.PIPE_BUF]) :]

    def _read_line(self, end: float) -> str:
        """Raises ``TimeoutError`` at ``end`` and ``EOFError`` when the process is dead."""
        line = b""
        while not line.endswith(b"\n"):
            _wait_for(self._stdout, select.POLLIN, end)
            received = os.read(self._stdout.fileno(), 4096)
            if not received:
                raise EOFError
            line += received
        return line.decode().strip()


def _wait_for(pipe: IO[bytes], event: int, end: float) -> None:
    """Until ``pipe`` can be read or written, or is broken. Raises ``TimeoutError`` at ``end``, a monotonic time."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError

"""Ends a round of dynamic sampling as soon as it is known on which groups the step trains.

A step trains on the first useful groups in order of prompt index (collect_rollouts.py). They are known when all
responses to the prompts up to the last of them are scored; responses to later prompts then change nothing, and the
engine gives them up. So the batch is that of a round which runs to its end: time decides what is dropped alone.

While they generate, the ranks tell each other rewards, in a second thread and on a process group that nothing else
uses. Every rank makes the same exchanges until all have finished, so all see the same, and stop at the same prompt.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any, Literal

import torch.distributed as dist

from megatron_ext import heartbeat
from megatron_ext.rollout.rewards.outcome import Outcome
from megatron_ext.train.signals import STEP_THREAD
from megatron_ext.types import Problem, Reward, Sample

Verdict = Literal["useful", "right", "wrong"]  # right, wrong: rewards all equal
Index = tuple[int, int]  # prompt index, sample
LookUp = Callable[[Problem, Sample], Reward | None]
Waiting = Callable[[], AbstractContextManager[None]]  # a wait for other ranks, noted
FIRST_POLL_S, LAST_POLL_S, SLOWER = 0.02, 0.5, 1.2  # between two exchanges: each is so many times as far as the last


def verdict_of(rewards: Sequence[Reward]) -> Verdict:
    """Whether a group's rewards, NaN left out, differ; if not, whether its responses are right."""
    scored = [reward for reward in rewards if not math.isnan(reward.value)]
    if len({reward.value for reward in scored}) > 1:
        return "useful"
    return "right" if scored and scored[0].outcome == Outcome.CORRECT else "wrong"


class WholeRound:
    """Of a round in which every response is needed."""

    num_dropped = 0

    def is_needed(self, prompt_index: int) -> bool:
        return True

    def finished(self, done: Mapping[Index, tuple[Problem, Sample]]) -> None:
        """Nobody is told."""

    def running(self, waiting: Waiting) -> AbstractContextManager[None]:
        return nullcontext()


class EarlyStop(WholeRound):
    """Of a round whose first ``wanted`` useful groups train; prompt indices begin with ``first``.

    ``look_up`` gives the reward of a finished response, once it is scored. ``num_dropped`` are the responses of all
    ranks that were not finished, known when the round has ended.
    """

    def __init__(
        self, group: dist.ProcessGroup, look_up: LookUp, *, first: int, samples: int, wanted: int, num_own: int
    ) -> None:
        self._group, self._look_up, self._samples, self._wanted = group, look_up, samples, wanted
        self._next, self._end = first, math.inf  # all before ``_next`` are known; from ``_end`` on none is needed
        self._num_unfinished = num_own
        self._new: SimpleQueue[tuple[Index, Problem, Sample]] = SimpleQueue()
        self._unscored: list[tuple[Index, Problem, Sample]] = []
        self._rewards: dict[int, dict[int, Reward]] = {}
        self._is_over = threading.Event()
        self._error: Exception | None = None  # of the thread

    def is_needed(self, prompt_index: int) -> bool:
        """From any thread."""
        return prompt_index < self._end

    def finished(self, done: Mapping[Index, tuple[Problem, Sample]]) -> None:
        """Responses of this rank. From the thread that generates."""
        for index, (problem, sample) in done.items():
            self._new.put((index, problem, sample))
        self._num_unfinished -= len(done)

    @contextmanager
    def running(self, waiting: Waiting) -> Iterator[None]:
        """The ranks tell each other within; left when all of them leave, for which they wait in ``waiting()``.
        Collective.

        An error leaves it at once: the others may wait for this rank elsewhere, and must see it end.
        """
        thread = threading.Thread(target=self._exchange_on, name=f"{STEP_THREAD}early stop", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._is_over.set()  # the thread may be in an exchange for ever: it ends with the process
            raise
        self._is_over.set()
        with heartbeat.waiting_for(thread):
            thread.join()
        if self._error is not None:
            raise self._error
        with waiting():
            while not self._exchange(is_over=True):
                pass

    def _exchange_on(self) -> None:
        poll_s = FIRST_POLL_S
        try:
            while not self._is_over.wait(poll_s):
                self._exchange(is_over=False)
                poll_s = min(LAST_POLL_S, SLOWER * poll_s)
        except Exception as error:  # such as a rank that has died
            self._error = error

    def _exchange(self, *, is_over: bool) -> bool:
        """Tell what is new, and hear of it; whether all ranks have finished."""
        own = self._newly_scored()
        everyone: list[Any] = [None] * self._group.size()
        dist.all_gather_object(everyone, (is_over, self._num_unfinished, own), group=self._group)
        for _, _, part in everyone:
            for (prompt_index, sample), reward in part.items():
                self._rewards.setdefault(prompt_index, {})[sample] = reward
        if any(part for _, _, part in everyone):
            heartbeat.progress()
        self._settle()
        self.num_dropped = sum(num for _, num, _ in everyone)
        return all(over for over, _, _ in everyone)

    def _newly_scored(self) -> dict[Index, Reward]:
        try:
            while True:
                self._unscored.append(self._new.get_nowait())
        except Empty:
            pass
        found = [(index, self._look_up(problem, sample)) for index, problem, sample in self._unscored]
        scored = {index: reward for index, reward in found if reward is not None}
        self._unscored = [each for each in self._unscored if each[0] not in scored]
        return scored

    def _settle(self) -> None:
        """Count the prompts whose groups are known, up to the last that is needed."""
        while self._end == math.inf and len(self._rewards.get(self._next, {})) == self._samples:
            self._wanted -= verdict_of(list(self._rewards.pop(self._next).values())) == "useful"
            self._next += 1
            if self._wanted == 0:
                self._end = self._next

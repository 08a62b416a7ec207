"""Which weights sample a step's batch, and when.

Batch k, which step k (counted from 0) trains on, is sampled by the weights after max(0, k - L) steps,
L = ``rollout.max_lag``: by no others, whatever takes how long. So it is sampled between the sync of these weights and
the next one, and then waits for its step, as part of the run's state. The first weights sample the batches 0 to L.

An engine that declares ``beside_training`` generates the newest of them in a second thread while the step trains on an
older one. That thread makes no collective but the engine's own: what the ranks tell each other of a batch, and the
later rounds of dynamic sampling, come when both have ended. An error of the step is not kept waiting by it: the thread
ends with the process. Other engines generate before the step trains: then a lag hides nothing. The batches are the
same.

A run that is given more steps when it has come within L of its last one lacks batches that earlier weights would have
sampled: those that it has sample them, as at the beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from megatron_ext import heartbeat
from megatron_ext.metrics.display import Phase, Watch
from megatron_ext.train.collect_rollouts import NextProblems, Own, Rollouts
from megatron_ext.train.sampled_batch import SampledBatch
from megatron_ext.train.signals import STEP_THREAD
from megatron_ext.train.trainer import Trainer


@contextmanager
def sampled(trainer: Trainer, watch: Watch) -> Iterator[SampledBatch]:
    """The batch of the trainer's step, whose weights the engine has just been given; the step trains in the block.

    On leaving it everything is sampled that these weights are to sample. Collective.
    """
    ahead, lag = trainer.ahead, trainer.config.rollout.max_lag
    last = min(trainer.step + lag, trainer.config.train.steps - 1)
    missing = list(range(trainer.step + len(ahead), last + 1))
    beside = missing.pop() if trainer.beside_training and missing and missing[-1] > trainer.step else None
    for phase in ("rollout", "reward"):
        watch.count(phase, 0.0)  # told of every step, also of one in which nothing is left to sample
    for step in missing:
        ahead.append(_finished(trainer, _rollouts(trainer, step, watch).collect(_next_problems(trainer, step))))
    if beside is None:
        trainer.engine.sleep()
        yield ahead.popleft()
        return
    rollouts, clock = _rollouts(trainer, beside, watch), BesideClock(watch.clock)
    problems = _next_problems(trainer, beside)(rollouts.num_first)
    trainer.weights.closed = True
    first = Beside(partial(replace(rollouts, watch=clock).sample, problems, first=0))
    yield ahead.popleft()
    with watch.phase("rollout"):
        own = first.result()
    watch.count("rollout_background", clock.end - clock.begin, tokens=clock.tokens)
    watch.beside(clock.begin, clock.end)
    ahead.append(_finished(trainer, rollouts.complete(own, _next_problems(trainer, beside))))
    trainer.engine.sleep()


class Beside:
    """A call in a second thread, which does not keep the process from ending."""

    def __init__(self, call: Callable[[], Own]) -> None:
        self._call, self._found = call, Future[Own]()
        self._thread = threading.Thread(target=self._run, name=f"{STEP_THREAD}rollout", daemon=True)
        self._thread.start()

    def result(self) -> Own:
        """What the call returns or raises, once it has."""
        with heartbeat.waiting_for(self._thread):
            self._thread.join()
        return self._found.result()

    def _run(self) -> None:
        try:
            self._found.set_result(self._call())
        except BaseException as error:
            self._found.set_exception(error)


class BesideClock:
    """When a second thread is at work, by ``clock``, and its tokens; nothing of it is shown."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self.tokens = clock, 0
        self.begin = self.end = clock()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        phase = Phase(name, None, None)
        yield phase
        self.tokens, self.end = self.tokens + phase.tokens, self._clock()

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()  # ranks do not meet in that thread


def _rollouts(trainer: Trainer, step: int, watch: Watch) -> Rollouts:
    return Rollouts(trainer.config, trainer.engine, trainer.pool, step, watch, stop_group=trainer.stop_group)


def _next_problems(trainer: Trainer, step: int) -> NextProblems:
    return partial(trainer.next_problems, step=step)


def _finished(trainer: Trainer, batch: SampledBatch) -> SampledBatch:
    """With the version of the weights, and where the order of the data stands after it."""
    batch.version = trainer.step
    batch.metrics |= {"data/epoch": float(trainer.order.epoch), "data/stage": float(trainer.order.stage)}
    return batch

"""The contract of a rollout engine: sample, and take new weights with a version.

What an engine declares of itself is in engine_spec.py; docs/adding-an-engine.md goes through both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.kept_tokens import Restriction
from megatron_ext.types import Sample


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. ``temperature`` 0 means greedy, ``top_k`` 0 all tokens.

    ``keeps_support``: samples bear the tokens that the sampler kept, where the engine can tell and leaves some out.
    ``routing``: and the experts of their tokens (``Sample.routing``), of an engine that heeds
    ``rollout.routing_replay``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = 1024
    top_k: int = 0
    min_p: float = 0.0
    keeps_support: bool = False
    routing: bool = False

    @property
    def restriction(self) -> Restriction:
        return Restriction(self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Request:
    """One response to sample. ``seed`` alone decides the randomness: the same request on the same
    weights gives the same response whatever else is in the batch and whichever rank serves it."""

    prompt_ids: tuple[int, ...]
    seed: int


OnBatch = Callable[[Mapping[int, Sample]], None]  # is given finished samples, each by the number of its request
IsNeeded = Callable[[int], bool]  # whether the request of that number is still to be answered; from any thread


def unfinished(request: Request, version: int) -> Sample:
    """In the place of a response that is no longer needed."""
    return Sample(request.prompt_ids, (), (), "", True, version)


class Weights(Protocol):
    """A model's weights under their Hugging Face names, whole, one tensor at a time.

    Each iteration is a fresh pass over all of them and a collective: every rank of the trainer makes it, to its end.
    """

    @property
    def closed(self) -> bool:
        """Whether the policy has begun to train: these weights can be had no more, and no iteration may begin."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what an iteration yields, in its order; no collective."""
        ...


class RolloutError(RuntimeError):
    """Responses can no longer be had: the run must stop."""


class RolloutEngine(Protocol):
    """Every method is called on every rank of the trainer, in the same order.

    Of an engine that declares ``beside_training``, ``generate`` may be called from a second thread while the first one
    trains; nothing else is called meanwhile.
    """

    tokenizer: Any

    def update_weights(self, weights: Weights, version: int) -> None:
        """Take new weights. An engine may iterate over them again until the next update, while it generates, as long
        as they are not ``closed``."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch | None = None
    ) -> list[Sample]:
        """One sample per request, in order. ``on_batch`` is given samples as they are finished, in any order, each
        once: they are scored while others are generated. What it is not given is scored afterwards.

        An engine that declares ``stops_early`` takes one more argument, ``is_needed: IsNeeded | None = None``: what is
        needed no longer never is again; it may be given up, and is then ``unfinished``.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory to the trainer until the next ``update_weights``."""
        ...

    def metrics(self) -> dict[str, float]:
        """What the engine counts, for the step's metrics; the same on every rank."""
        ...

    def close(self) -> None: ...

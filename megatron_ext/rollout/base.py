"""The contract of a rollout engine: sample, and take new weights with a version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_ext.types import Sample


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. ``temperature`` 0 means greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = 1024


@dataclass(frozen=True)
class Request:
    """One response to draw. ``seed`` alone decides the randomness: the same request on the same
    weights gives the same response whatever else is in the batch and whichever rank serves it."""

    prompt_ids: tuple[int, ...]
    seed: int


class RolloutEngine(Protocol):
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take Hugging Face-named weights, streamed one tensor at a time."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: Callable[[list[Sample]], None] | None = None
    ) -> list[Sample]:
        """One sample per request, in order. ``on_batch`` sees samples as they are finished, for progress."""
        ...

    def close(self) -> None: ...

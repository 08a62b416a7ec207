"""Which columns of the vocabulary a rank holds, and the group it exchanges row statistics with."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class VocabShard:
    """Columns ``[start, stop)`` of a vocabulary split over ``group``.

    ``vocab_size`` is the real (unpadded) vocabulary: columns with a global id of ``vocab_size`` or more
    count as minus infinity and get no gradient. ``group`` None (or of one rank): nothing is exchanged.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"VocabShard: expected 0 <= start < stop, found start {self.start}, stop {self.stop}")
        if self.vocab_size < 1:
            raise ValueError(f"VocabShard: expected a vocab_size of at least 1, found {self.vocab_size}")

    @property
    def width(self) -> int:
        """Columns held by this rank, padding included."""
        return self.stop - self.start

    @property
    def real(self) -> int:
        """Columns held by this rank that are not padding; they come first."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

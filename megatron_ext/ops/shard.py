"""Which columns of the vocabulary a rank holds, and the group that holds the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_ext.ops.collectives import group_rank, group_size


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

    @classmethod
    def for_vocab(
        cls, vocab_size: int, group: dist.ProcessGroup | None = None, *, padded_size: int | None = None
    ) -> VocabShard:
        """This rank's part of Megatron's equal split: rank r of n holds ``[r * width, (r + 1) * width)``.

        ``width = ceil(padded_size / n)``. ``padded_size`` is the vocabulary with its padding, the number of rows of the
        output layer over all ranks (Megatron's ``padded_vocab_size``); None: no more padding than n ranks need.
        """
        if padded_size is not None and padded_size < vocab_size:
            raise ValueError(f"VocabShard: expected a padded_size of at least {vocab_size}, found {padded_size}")
        width = -(-(padded_size or vocab_size) // group_size(group))
        start = group_rank(group) * width
        return cls(start, start + width, vocab_size, group)

    @property
    def width(self) -> int:
        """Columns held by this rank, padding included."""
        return self.stop - self.start

    @property
    def real(self) -> int:
        """Columns held by this rank that are not padding; they come first."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

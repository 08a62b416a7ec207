"""The numbers of a token between its logits and its outputs, by name.

Each is ``[T, 1]``; they lie side by side, ``packed``, where ranks exchange them and where a backward keeps them. The
kernels keep theirs packed, in the same order (kernels/columns.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ShardStats(NamedTuple):
    """What one rank's columns say of a token, with d = (x - maximum) * scale. Packed: ``[T, 4]``."""

    maximum: Tensor
    total: Tensor  # sum e^d
    moment: Tensor  # sum d e^d; 0 where the entropy is not wanted
    target: Tensor  # the target's logit, minus infinity where another rank has it

    @staticmethod
    def unpack(packed: Tensor) -> ShardStats:
        """Views of ``packed``, which may have more axes in front."""
        return ShardStats(*packed.split(1, dim=-1))


class NucleusStats(NamedTuple):
    """The nucleus of a token over the whole vocabulary. ``size`` is -1 where the candidates did not resolve it."""

    theta: Tensor  # the logit of the cutoff token
    mass: Tensor  # sum e^d over the nucleus
    entropy: Tensor
    size: Tensor  # tokens of the vocabulary in the nucleus


class GlobalStats(NamedTuple):
    """What every rank knows of a token after the exchange, d relative to the maximum over the whole vocabulary.

    Packed: ``[T, 8]``, or ``[T, 4]`` without a nucleus. ``entropy`` means nothing where it was not wanted.
    """

    maximum: Tensor
    total: Tensor
    entropy: Tensor
    target: Tensor
    nucleus: NucleusStats | None = None

    def pack(self, dtype: torch.dtype) -> Tensor:
        columns = self.maximum, self.total, self.entropy, self.target, *(self.nucleus or ())
        return torch.cat([column.to(dtype) for column in columns], 1)

    @staticmethod
    def unpack(packed: Tensor) -> GlobalStats:
        maximum, total, entropy, target, *nucleus = packed.split(1, dim=1)
        return GlobalStats(maximum, total, entropy, target, NucleusStats(*nucleus) if nucleus else None)

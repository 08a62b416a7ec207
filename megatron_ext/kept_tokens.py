"""What a sampler left of the vocabulary, in host memory: between the engine that recorded it and the micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Restriction(NamedTuple):
    """What sampling leaves out of the vocabulary (rollout/sampling.py). As it stands: nothing."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class KeptTokens(NamedTuple):
    """The tokens of the vocabulary that the sampler kept for each of T tokens, in CSR form, in host memory.

    No ids for a token: the whole vocabulary, or not known (PackedSupport).
    """

    ids: np.ndarray  # [N] int32, ascending within a token
    starts: np.ndarray  # [T + 1] int64

    @staticmethod
    def of_pairs(token: np.ndarray, ids: np.ndarray, num_tokens: int) -> KeptTokens:
        """From pairs of a token's position and an id, in any order."""
        order = np.lexsort((ids, token))
        counts = np.bincount(token, minlength=num_tokens)
        return KeptTokens(ids[order].astype(np.int32), np.concatenate([[0], counts.cumsum()]).astype(np.int64))

    @staticmethod
    def of_lists(lists: Sequence[Sequence[int] | np.ndarray]) -> KeptTokens:
        """From each token's ids, in any order."""
        token = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
        ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, dtype=np.int32) for ids in lists)])
        return KeptTokens.of_pairs(token, ids, len(lists))

    @staticmethod
    def empty(num_tokens: int) -> KeptTokens:
        return KeptTokens(np.empty(0, np.int32), np.zeros(num_tokens + 1, np.int64))

    @staticmethod
    def join(parts: Sequence[KeptTokens]) -> KeptTokens:
        """Those of the tokens of the first part, then of the second, ..."""
        sizes = np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)])
        ids = np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)])
        return KeptTokens(ids, np.concatenate([[0], sizes.cumsum()]).astype(np.int64))

    @property
    def sizes(self) -> np.ndarray:
        """``[T]``: how many tokens of the vocabulary each token has."""
        return np.diff(self.starts)

    @property
    def token(self) -> np.ndarray:
        """``[N]``: the position of the token that each id belongs to."""
        return np.repeat(np.arange(len(self.starts) - 1), self.sizes)

    def select(self, token: np.ndarray) -> KeptTokens:
        """Those of the tokens at the positions ``token``, ascending."""
        chosen = np.zeros(len(self.starts) - 1, dtype=bool)
        chosen[token] = True
        starts = np.concatenate([[0], self.sizes[token].cumsum()]).astype(np.int64)
        return KeptTokens(self.ids[chosen[self.token]], starts)

    def filled(self, other: KeptTokens, where: np.ndarray) -> KeptTokens:
        """Those of ``other`` for the tokens at which the mask ``where [T]`` is true, which have none here."""
        taken = where[other.token]
        token = np.concatenate([self.token, other.token[taken]])
        return KeptTokens.of_pairs(token, np.concatenate([self.ids, other.ids[taken]]), len(self.sizes))

    def with_targets(self, targets: np.ndarray) -> tuple[KeptTokens, np.ndarray]:
        """With the token ``[T]`` that was sampled in each, and where ``[T]`` it was missing: it was kept, for it was
        sampled, but rounding or a fault left it out."""
        found = np.bincount(self.token[self.ids == targets[self.token]], minlength=len(targets)) > 0
        missing = ~found & (self.sizes > 0)
        if not missing.any():
            return self, missing
        token = np.concatenate([self.token, missing.nonzero()[0]])
        return KeptTokens.of_pairs(token, np.concatenate([self.ids, targets[missing]]), len(targets)), missing


@dataclass
class PackedSupport:
    """What the sampler kept of the vocabulary for each of a micro-batch's T response tokens.

    What the engine did not record is filled in, where the logits are, by the first pass: it must be one of the policy
    that sampled (model/supports.py).
    """

    restriction: Restriction
    kept: KeptTokens
    unknown: np.ndarray  # [T] bool, tokens that are still to be filled in
    outside: np.ndarray  # [T] bool, where the sampled token was not among them: it was put there

    @staticmethod
    def recorded(restriction: Restriction, kept: KeptTokens, unknown: np.ndarray, targets: np.ndarray) -> PackedSupport:
        with_targets, outside = kept.with_targets(targets)
        return PackedSupport(restriction, with_targets, unknown, outside)

    def select(self, token: np.ndarray) -> PackedSupport:
        """What is known of the tokens at the positions ``token``, ascending."""
        return PackedSupport(self.restriction, self.kept.select(token), self.unknown[token], self.outside[token])

    @property
    def is_known(self) -> bool:
        return not self.unknown.any()

    def fill(self, found: KeptTokens, targets: np.ndarray) -> None:
        """Take what is not known from ``found``."""
        self.kept, missing = self.kept.filled(found, self.unknown).with_targets(targets)
        self.unknown, self.outside = np.zeros_like(self.unknown), self.outside | missing

"""The tokens of the vocabulary that a sampler kept, for every token of a response: the support of what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.shard import VocabShard


class Support(NamedTuple):
    """The ids kept for each of T tokens, in compressed sparse rows: token t has ``ids[starts[t]:starts[t + 1]]``.

    An empty row means the whole vocabulary: the sampler did not restrict, or could not tell.
    """

    ids: Tensor  # [N] int64 or int32, global token ids, ascending within a token
    starts: Tensor  # [T + 1] int64, from 0 to N

    @staticmethod
    def from_rows(kept: Sequence[Sequence[int] | Tensor]) -> Support:
        """From the ids of every token, in any order."""
        parts = [torch.as_tensor(row, dtype=torch.int64).sort().values for row in kept]
        ids = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return Support(ids, _starts(torch.tensor([len(part) for part in parts], dtype=torch.int64)))

    @staticmethod
    def unrestricted(T: int, device: torch.device | str = "cpu") -> Support:
        """T tokens that were sampled from the whole vocabulary."""
        ids = torch.empty(0, dtype=torch.int64, device=device)
        return Support(ids, torch.zeros(T + 1, dtype=torch.int64, device=device))

    @staticmethod
    def join(parts: Sequence[Support]) -> Support:
        """The tokens of all ``parts``, of which there is at least one, one after the other."""
        return Support(torch.cat([part.ids for part in parts]), _starts(torch.cat([part.sizes for part in parts])))

    @property
    def num_tokens(self) -> int:
        """T. ``len`` of a named tuple is 2."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> Tensor:
        """``[T]``: how many ids each token has; 0 stands for the whole vocabulary."""
        return self.starts.diff()

    def token_of_id(self) -> Tensor:
        """``[N]`` int64: the token that each id belongs to."""
        tokens = torch.arange(self.num_tokens, device=self.ids.device)
        return tokens.repeat_interleave(self.sizes, output_size=len(self.ids))

    def unrestricted_tokens(self) -> Tensor:
        """The tokens whose support is the whole vocabulary, ascending. On a GPU this waits for the device."""
        return (self.sizes == 0).nonzero()[:, 0]

    def split(self, size: int) -> list[Support]:
        """Consecutive parts of ``size`` tokens, the last of what is left; views. On a GPU this waits for the device."""
        edges = [*range(0, self.num_tokens, size), self.num_tokens] if self.num_tokens else [0, 0]
        bounds = self.starts[edges].tolist()
        return [
            Support(self.ids[begin:end], self.starts[first : last + 1] - begin)
            for first, last, begin, end in zip(edges, edges[1:], bounds, bounds[1:], strict=False)
        ]

    def select(self, positions: Tensor) -> Support:
        """The tokens at ``positions``, int64 in any order, or a mask ``[T]``."""
        first, sizes = self.starts[:-1][positions], self.sizes[positions]
        starts = _starts(sizes)
        total = int(starts[-1])
        within = torch.arange(total, device=self.ids.device) - starts[:-1].repeat_interleave(sizes, output_size=total)
        return Support(self.ids[first.repeat_interleave(sizes, output_size=total) + within], starts)

    def to(self, device: torch.device | str) -> Support:
        return Support(self.ids.to(device), self.starts.to(device))

    def columns(self, shard: VocabShard) -> tuple[Tensor, Tensor]:
        """``[N]`` twice: each id's column in the shard, 0 where another rank holds it, and whether this rank does."""
        column = self.ids - shard.start
        held = (column >= 0) & (column < shard.real)
        return torch.where(held, column, 0), held

    def check(self, caller: str, T: int, vocab_size: int, device: torch.device) -> None:
        """Raise ValueError, naming the caller, where this is no support of T tokens. On a GPU values are not read."""
        ids, starts = self
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{caller}: the support's ids are {ids.dtype} {list(ids.shape)}, expected int64 or int32 [N]"
            )
        if starts.shape != (T + 1,) or starts.dtype != torch.int64:
            raise ValueError(
                f"{caller}: the support's starts are {starts.dtype} {list(starts.shape)}, expected int64 [{T + 1}], "
                "one more than there are tokens"
            )
        if ids.device != device or starts.device != device:
            raise ValueError(f"{caller}: the support is on {ids.device} and the logits on {device}: move it with to()")
        if device.type != "cpu":
            return
        if int(starts[0]) != 0 or int(starts[-1]) != len(ids) or bool((starts.diff() < 0).any()):
            raise ValueError(
                f"{caller}: the support's starts must rise from 0 to the number of ids, {len(ids)}; found "
                f"{int(starts.min())} to {int(starts.max())}, ending at {int(starts[-1])}"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"{caller}: the support has ids from {int(ids.min())} to {int(ids.max())}, expected [0, {vocab_size})"
            )
        token = self.token_of_id()
        if bool(((ids.diff() <= 0) & (token.diff() == 0)).any()):
            raise ValueError(f"{caller}: the support's ids must ascend within a token, each once (Support.from_rows)")


def _starts(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))

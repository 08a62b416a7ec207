"""The highest logits of every row of a shard, in a fixed number of bytes: what the nucleus is decided from.

bf16 logits take few distinct values, so a window counts tokens: entry i is the number of tokens whose value lies i
representable steps below the row's maximum. Other logits are listed: the highest values in descending order.
``floor`` is the promise: every token above it is in the window.

The highest values are found through block maxima: the k highest values of a row lie in the k blocks with the highest
maxima, so no selection ever runs over the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import numpy
except ModuleNotFoundError:  # torch does without it, slower
    numpy = None

STRIDE = 16  # columns of one block; block j of n holds columns j, j + n, j + 2n, ...
SMALL = 4096  # rows no wider than this are searched whole


class Blocks(NamedTuple):
    """The blocks of a row with the highest maxima, in any order: no other block has a higher one than the least here.

    ``place`` ``[T, K]`` int32, which block; ``maxima`` ``[T, K]``.
    """

    place: Tensor
    maxima: Tensor

    def rows(self, rows: slice) -> Blocks:
        return Blocks(self.place[rows], self.maxima[rows])


class Mass(NamedTuple):
    """What a window may leave out: ``tail`` of the shard's ``total`` ``[R, 1]``, masses being e^((x - max) * scale)."""

    total: Tensor
    scale: Tensor
    tail: float


@dataclass(frozen=True)
class Candidates:
    """``entries`` ``[T, K]`` logits descending, or ``[T, 2K]`` int16 counts of keys; ``floor`` ``[T, 1]``.

    ``blocks`` stay on this rank: where the window was found, for a backward that goes there again.
    """

    entries: Tensor
    floor: Tensor
    blocks: Blocks | None = None

    @property
    def keys(self) -> bool:
        return self.entries.dtype == torch.int16

    @staticmethod
    def join(parts: list[Candidates]) -> Candidates:
        chosen = [part.blocks for part in parts if part.blocks is not None]
        blocks = Blocks(*(torch.cat(value) for value in zip(*chosen, strict=True))) if chosen else None
        return Candidates(
            torch.cat([part.entries for part in parts]), torch.cat([part.floor for part in parts]), blocks
        )

    @staticmethod
    def empty(T: int, K: int, logits: torch.dtype, dtype: torch.dtype, device: torch.device) -> Candidates:
        """The window of rows without columns: nothing is missing from it."""
        floor = torch.full((T, 1), -torch.inf, dtype=dtype, device=device)
        if logits == torch.bfloat16:
            return Candidates(torch.zeros((T, 2 * K), dtype=torch.int16, device=device), floor)
        return Candidates(torch.full((T, K), -torch.inf, dtype=dtype, device=device), floor)

    def unpack(self, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and token counts ``[T, entries]``; ``maximum`` ``[T, 1]`` is the row's in its shard."""
        if not self.keys:
            return self.entries, (self.entries > -torch.inf).to(self.entries.dtype)
        return _key_values(maximum, self.entries.shape[1]), self.entries.to(maximum.dtype)


def merge_candidates(parts: list[Candidates], maxima: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``[T, E]`` descending and token counts of the ranks' windows; ``maxima`` are the rows' in each shard.

    Keys are counted from the highest rank's maximum down: below its window nothing can be certified anyway.
    """
    top = torch.stack(maxima).amax(0)
    if len(parts) == 1:
        return parts[0].unpack(top)
    if not parts[0].keys:
        entries = torch.cat([part.entries for part in parts], 1)
        entries = highest(entries, entries.shape[1])
        return entries, (entries > -torch.inf).to(entries.dtype)
    K = parts[0].entries.shape[1]
    count = torch.zeros((len(top), K + 1), dtype=torch.int32, device=top.device)
    below = torch.arange(K, device=top.device)
    for part, maximum in zip(parts, maxima, strict=True):
        index = (below + (order_key(top) - order_key(maximum) >> 16)).clamp_max(K)
        count.scatter_add_(1, index, part.entries.int())
    return _key_values(top, K), count[:, :K].to(top.dtype)


def _key_values(maximum: Tensor, K: int) -> Tensor:
    lowest = order_key(torch.full_like(maximum, -torch.inf))
    key = order_key(maximum) - (torch.arange(K, device=maximum.device) << 16)
    return from_order_key(torch.maximum(key, lowest), maximum.dtype)


def order_key(x: Tensor) -> Tensor:
    """int64 keys in the order of the floats, 0.0 and -0.0 alike. A bf16 step is 2^16 keys of fp32."""
    bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits).long()


def from_order_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return torch.where(key < 0, torch.iinfo(integer).min - key, key).to(integer).view(dtype)


def num_blocks(V: int) -> int:
    return V if V <= SMALL else -(-V // STRIDE)


def block_maxima(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``[R, V] -> [R, num_blocks(V)]``: the maximum of every block; a small row's are its own columns."""
    V, n = x.shape[1], num_blocks(x.shape[1])
    if n == V:
        return x if out is None else out.copy_(x)
    whole = n * (STRIDE - 1)
    blocks = x[:, :whole].unflatten(1, (STRIDE - 1, n))
    maxima = blocks.amax(1) if out is None else torch.amax(blocks, 1, out=out)
    last = maxima[:, : V - whole]
    torch.maximum(last, x[:, whole:], out=last)
    return maxima


def make_candidates(logits: Tensor, maxima: Tensor, top: Tensor, K: int, mass: Mass) -> Candidates:
    """The window of rows ``[R, V]`` with their block maxima ``[R, n]`` and maximum ``[R, 1]``.

    It ends where the mass of the highest maxima leaves no more than ``mass.tail``, or after K blocks.
    """
    V, n = logits.shape[1], maxima.shape[1]
    if n <= K:
        return _candidates(logits.to(top.dtype), torch.full_like(top, -torch.inf), top, K, logits.dtype)
    index = _highest_blocks(maxima, K)
    blocks = Blocks(index.int(), maxima.gather(1, index))
    falling = highest(blocks.maxima, K)
    held = ((falling - top) * mass.scale).exp_().cumsum(-1) < (1 - mass.tail) * mass.total
    highest_missing = falling.gather(1, (held.sum(-1, keepdim=True) + 1).clamp_max(K - 1))
    row, place = (blocks.maxima >= highest_missing).nonzero(as_tuple=True)
    row, column = _members(row, index[row, place], n, V)
    value = logits[row, column].to(top.dtype)
    above = value > highest_missing[row, 0]
    return _candidates(_by_row(value[above], row[above], len(top)), highest_missing, top, K, logits.dtype, blocks)


def _candidates(
    candidates: Tensor, highest_missing: Tensor, top: Tensor, K: int, logits: torch.dtype, blocks: Blocks | None = None
) -> Candidates:
    """From the values ``candidates`` ``[R, n]``; ``highest_missing`` bounds what may be missing from them."""
    if candidates.shape[1] > 2 * K:  # counting costs more than leaving out
        candidates = highest(candidates, 2 * K, in_order=False)
        highest_missing = torch.maximum(highest_missing, candidates.amin(-1, keepdim=True))
    make = _count if logits == torch.bfloat16 else _list
    found = make(candidates, highest_missing, top, K)
    return Candidates(found.entries, found.floor, blocks)


def _by_row(value: Tensor, row: Tensor, R: int) -> Tensor:
    """``[n] -> [R, longest]``: the values of every row (``row`` ascends), then minus infinity."""
    count = torch.bincount(row, minlength=R)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    rows = torch.full((R, int(count.max())), -torch.inf, dtype=value.dtype, device=value.device)
    rows[row, place] = value
    return rows


def _list(candidates: Tensor, highest_missing: Tensor, top: Tensor, K: int) -> Candidates:
    entries = highest(candidates, min(K, candidates.shape[1]))
    missing = entries.new_full((len(entries), K - entries.shape[1]), -torch.inf)
    floor = torch.maximum(highest_missing, entries[:, -1:]) if candidates.shape[1] > K else highest_missing
    return Candidates(torch.cat([entries, missing], 1), floor)


def _count(candidates: Tensor, highest_missing: Tensor, top: Tensor, K: int) -> Candidates:
    """Tokens at each of 2K keys from the maximum down; ``highest_missing`` is the highest value that may be missing."""
    first = order_key(top)
    step = (first - order_key(candidates) >> 16).clamp_(0, 2 * K)
    step = torch.where(candidates > -torch.inf, step, 2 * K)
    count = torch.zeros((len(step), 2 * K + 1), dtype=torch.int32, device=step.device)
    count.scatter_add_(1, step, torch.ones_like(step, dtype=torch.int32))
    return counted_candidates(count[:, :-1], highest_missing, top)


def counted_candidates(count: Tensor, highest_missing: Tensor, top: Tensor) -> Candidates:
    """From int32 counts ``[T, 2K]`` of keys from the maximum ``top`` down; ``highest_missing`` as in :func:`_count`."""
    first, most = order_key(top), torch.iinfo(torch.int16).max
    end = torch.maximum(first - (count.shape[1] << 16), order_key(torch.full_like(top, -torch.inf)))
    floor = torch.maximum(from_order_key(end, top.dtype), highest_missing)
    floor = torch.where((count > most).any(-1, keepdim=True), torch.inf, floor)  # does not fit: decided otherwise
    return Candidates(count.clamp_max(most).short(), floor)


def _highest_blocks(maxima: Tensor, k: int) -> Tensor:
    """Indices ``[R, k]`` of the highest maxima, in any order. numpy partitions six times as fast as torch's topk."""
    if maxima.is_cuda or numpy is None:
        return maxima.topk(k, sorted=False).indices
    below = maxima.shape[1] - k
    return torch.from_numpy(numpy.argpartition(maxima.numpy(), below, axis=-1)[:, below:])


def highest(x: Tensor, k: int, *, in_order: bool = True) -> Tensor:
    """``[R, n] -> [R, k]``: the highest values, in descending order unless that does not matter."""
    if x.is_cuda or numpy is None:
        return x.topk(k, sorted=in_order).values
    value, below = x.numpy(), x.shape[1] - k
    if below:
        value = numpy.partition(value, below, axis=-1)[:, below:]
    if not in_order:
        return torch.from_numpy(value)
    return torch.from_numpy(numpy.sort(value, axis=-1)).flip(1)


def ascending(x: Tensor) -> Tensor:
    """``[R, n]`` sorted along the rows; ``x`` may be overwritten."""
    if x.is_cuda or numpy is None:
        return x.sort(dim=-1).values
    x = x.contiguous()
    x.numpy().sort(axis=-1)
    return x


def _members(row: Tensor, block: Tensor, n: int, V: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of the given blocks ``[m]``, n of which make a row of V."""
    if n == V:
        return row, block
    column = (block[:, None] + torch.arange(0, STRIDE * n, n, device=block.device)).flatten()
    row = row[:, None].expand(-1, STRIDE).flatten()
    inside = column < V
    return row[inside], column[inside]


def in_nucleus(x: Tensor, theta: Tensor, keep_equal: bool) -> Tensor:
    """Mask of the logits above theta; those equal to it belong if ``keep_equal``."""
    return (x >= theta) & (x > -torch.inf) if keep_equal else x > theta


def positions_above(x: Tensor, index: Tensor, blocks: Blocks, theta: Tensor, keep_equal: bool) -> Tensor:
    """``[2, n]``: row and column of the entries of ``x`` ``[R, V]``, in the rows ``index``, that are in the nucleus.

    Every row's theta must be higher than the least of its blocks' maxima: nothing of its nucleus is then elsewhere.
    """
    V, n = x.shape[1], num_blocks(x.shape[1])
    row, place = (blocks.maxima[index] >= theta[index]).nonzero(as_tuple=True)
    row = index[row]
    row, column = _members(row, blocks.place[row, place].long(), n, V)
    kept = in_nucleus(x[row, column], theta[row, 0], keep_equal)
    return torch.stack([row[kept], column[kept]])

"""The highest logits of every row of a shard, in a fixed number of bytes: what the nucleus is decided from.

bf16 logits take few distinct values, so a window counts tokens: entry i is the number of tokens whose value lies i
representable steps below the row's maximum. Other logits are listed: the highest values in descending order.
``floor`` is the promise: every token above it is in the window.

The highest values are found through block maxima: the k highest values of a row lie in the k blocks with the highest
maxima, so no selection ever runs over the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

STRIDE = 16  # columns of one block; block j of n holds columns j, j + n, j + 2n, ...
SMALL = 4096  # rows no wider than this are searched whole


@dataclass(frozen=True)
class Window:
    """``entries`` ``[T, K]`` logits descending, or ``[T, 2K]`` int16 counts of keys; ``floor`` ``[T, 1]``."""

    entries: Tensor
    floor: Tensor

    @property
    def keys(self) -> bool:
        return self.entries.dtype == torch.int16

    @staticmethod
    def join(parts: list[Window]) -> Window:
        return Window(torch.cat([part.entries for part in parts]), torch.cat([part.floor for part in parts]))

    @staticmethod
    def empty(T: int, K: int, logits: torch.dtype, dtype: torch.dtype, device: torch.device) -> Window:
        """The window of rows without columns: nothing is missing from it."""
        floor = torch.full((T, 1), -torch.inf, dtype=dtype, device=device)
        if logits == torch.bfloat16:
            return Window(torch.zeros((T, 2 * K), dtype=torch.int16, device=device), floor)
        return Window(torch.full((T, K), -torch.inf, dtype=dtype, device=device), floor)

    def unpack(self, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and token counts ``[T, entries]``; ``maximum`` ``[T, 1]`` is the row's in its shard."""
        if not self.keys:
            return self.entries, (self.entries > -torch.inf).to(self.entries.dtype)
        return _key_values(maximum, self.entries.shape[1]), self.entries.to(maximum.dtype)


def merge_windows(parts: list[Window], maxima: list[Tensor]) -> tuple[Tensor, Tensor]:
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


def make_window(logits: Tensor, maxima: Tensor, top: Tensor, K: int) -> Window:
    """The window of rows ``[R, V]`` with their block maxima ``[R, n]`` and maximum ``[R, 1]``."""
    reach = torch.full_like(top, -torch.inf)
    if maxima.shape[1] > K:
        block = _highest_blocks(maxima, K)
        reach = maxima.gather(1, block).amin(-1, keepdim=True)
        candidates = _members(logits, block, maxima.shape[1]).to(top.dtype)
    else:
        candidates = logits.to(top.dtype)
    if logits.dtype == torch.bfloat16:
        if candidates.shape[1] > 4 * K:  # counting costs more than leaving out
            candidates = highest(candidates, 4 * K)
            reach = torch.maximum(reach, candidates[:, -1:])
        return _count(candidates, reach, top, K)
    return _list(candidates, logits.shape[1] > K, K)


def _list(candidates: Tensor, more: bool, K: int) -> Window:
    entries = highest(candidates, min(K, candidates.shape[1]))
    missing = entries.new_full((len(entries), K - entries.shape[1]), -torch.inf)
    floor = entries[:, -1:] if more else entries.new_full((len(entries), 1), -torch.inf)
    return Window(torch.cat([entries, missing], 1), floor)


def _count(candidates: Tensor, reach: Tensor, top: Tensor, K: int) -> Window:
    """Tokens at each of 2K keys from the maximum down; ``reach`` is the highest value that may be missing."""
    first = order_key(top)
    step = (first - order_key(candidates) >> 16).clamp_(0, 2 * K)
    step = torch.where(candidates > -torch.inf, step, 2 * K)
    count = torch.zeros((len(step), 2 * K + 1), dtype=torch.int32, device=step.device)
    count.scatter_add_(1, step, torch.ones_like(step, dtype=torch.int32))
    return counted_window(count[:, :-1], reach, top)


def counted_window(count: Tensor, reach: Tensor, top: Tensor) -> Window:
    """The window of int32 counts ``[T, 2K]`` from the maximum ``top`` down; ``reach`` as in :func:`_count`."""
    first, most = order_key(top), torch.iinfo(torch.int16).max
    end = torch.maximum(first - (count.shape[1] << 16), order_key(torch.full_like(top, -torch.inf)))
    floor = torch.maximum(from_order_key(end, top.dtype), reach)
    floor = torch.where((count > most).any(-1, keepdim=True), torch.inf, floor)  # does not fit: decided otherwise
    return Window(count.clamp_max(most).short(), floor)


def _highest_blocks(maxima: Tensor, k: int) -> Tensor:
    """Indices ``[R, k]`` of the highest maxima, in any order. numpy partitions six times as fast as torch's topk."""
    if maxima.is_cuda:
        return maxima.topk(k, sorted=False).indices
    below = maxima.shape[1] - k
    return torch.from_numpy(numpy.argpartition(maxima.numpy(), below, axis=-1)[:, below:])


def highest(x: Tensor, k: int) -> Tensor:
    """``[R, n] -> [R, k]``: the highest values in descending order."""
    if x.is_cuda:
        return x.topk(k).values
    value, below = x.numpy(), x.shape[1] - k
    if below:
        value = numpy.partition(value, below, axis=-1)[:, below:]
    return torch.from_numpy(numpy.sort(value, axis=-1)).flip(1)


def ascending(x: Tensor) -> Tensor:
    """``[R, n]`` sorted along the rows; ``x`` may be overwritten."""
    if x.is_cuda:
        return x.sort(dim=-1).values
    x = x.contiguous()
    x.numpy().sort(axis=-1)
    return x


def _members(x: Tensor, block: Tensor, n: int) -> Tensor:
    """``[R, k] -> [R, k * stride]``: the logits of the chosen blocks, minus infinity past the row's end."""
    if n == x.shape[1]:
        return x.gather(1, block)
    whole = n * (STRIDE - 1)
    member = x[:, :whole].unflatten(1, (STRIDE - 1, n)).gather(2, block[:, None].expand(-1, STRIDE - 1, -1))
    last = x.gather(1, (block + whole).clamp_max(x.shape[1] - 1))
    last = last.masked_fill_(block + whole >= x.shape[1], -torch.inf)
    return torch.cat([member.flatten(1), last], 1)


def in_nucleus(x: Tensor, theta: Tensor, keep_equal: bool, column: Tensor, cut: Tensor | None) -> Tensor:
    """Mask of the logits above theta; those equal to it belong if ``keep_equal``, or up to column ``cut``."""
    if cut is None:
        return (x >= theta) & (x > -torch.inf) if keep_equal else x > theta
    return (x > theta) | ((x == theta) & (column <= cut))


def positions_above(x: Tensor, index: Tensor, theta: Tensor, keep_equal: bool, cut: Tensor | None) -> Tensor:
    """``[2, n]``: row and column of the entries of ``x`` ``[R, V]``, in the rows ``index``, that are in the nucleus."""
    V, n = x.shape[1], num_blocks(x.shape[1])
    maxima = torch.empty((len(index), n), dtype=x.dtype, device=x.device)
    for i, row in enumerate(index.tolist()):
        block_maxima(x[row : row + 1], maxima[i : i + 1])
    row, column = (maxima >= theta[index]).nonzero(as_tuple=True)
    row = index[row]
    if n < V:
        column = (column[:, None] + torch.arange(0, STRIDE * n, n, device=x.device)).flatten()
        row = row[:, None].expand(-1, STRIDE).flatten()
        row, column = row[column < V], column[column < V]
    kept = in_nucleus(x[row, column], theta[row, 0], keep_equal, column, None if cut is None else cut[row, 0])
    return torch.stack([row[kept], column[kept]])

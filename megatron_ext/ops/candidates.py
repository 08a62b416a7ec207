"""The candidates of a token: the highest logits of a shard, in a fixed number of bytes. They decide the nucleus.

bf16 logits take few distinct values, so they are counted: entry i is the number of logits that lie i representable
steps below the token's maximum. Other logits are listed: the highest values in descending order.
``floor`` is the promise: every logit above it is among the candidates.

The highest values are found through block maxima: the k highest logits of a token lie in the k blocks with the highest
maxima, so no selection ever runs over the whole shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.sorting import from_order_key, highest, highest_columns, order_key

STRIDE = 16  # columns of one block; block j of n holds columns j, j + n, j + 2n, ...
SMALL = 4096  # shards no wider than this are searched whole


class Blocks(NamedTuple):
    """The blocks of a token with the highest maxima, in any order: no other has a higher one than the least here."""

    block: Tensor  # [T, K] int32, which of the token's blocks
    maxima: Tensor  # [T, K]

    def tokens(self, tokens: slice) -> Blocks:
        return Blocks(self.block[tokens], self.maxima[tokens])


class Mass(NamedTuple):
    """What the candidates may leave out: ``tail`` of the shard's ``total``, masses being e^((x - max) * scale)."""

    total: Tensor  # [T, 1]
    scale: Tensor  # [T, 1]
    tail: float


@dataclass(frozen=True)
class Candidates:
    """``blocks`` stay on this rank: where the candidates were found, for a backward that goes there again."""

    entries: Tensor  # [T, K] logits descending, or [T, 2K] int16 counts
    floor: Tensor  # [T, 1]
    blocks: Blocks | None = None

    @property
    def counted(self) -> bool:
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
        """Those of tokens without columns: nothing is missing."""
        floor = torch.full((T, 1), -torch.inf, dtype=dtype, device=device)
        if logits == torch.bfloat16:
            return Candidates(torch.zeros((T, 2 * K), dtype=torch.int16, device=device), floor)
        return Candidates(torch.full((T, K), -torch.inf, dtype=dtype, device=device), floor)

    def unpack(self, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and how many have each ``[T, entries]``; ``maximum`` ``[T, 1]`` is the token's in the shard."""
        if not self.counted:
            return self.entries, (self.entries > -torch.inf).to(self.entries.dtype)
        return _key_values(maximum, self.entries.shape[1]), self.entries.to(maximum.dtype)


def merge_candidates(parts: list[Candidates], maxima: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``[T, E]`` descending and the counts of all ranks' candidates; ``maxima`` are the tokens' in each shard.

    Counts start at the highest rank's maximum: below its last one nothing can be resolved anyway.
    """
    top = torch.stack(maxima).amax(0)
    if len(parts) == 1:
        return parts[0].unpack(top)
    if not parts[0].counted:
        entries = torch.cat([part.entries for part in parts], 1)
        entries = highest(entries, entries.shape[1])
        return entries, (entries > -torch.inf).to(entries.dtype)
    K = parts[0].entries.shape[1]
    count = torch.zeros((len(top), K + 1), dtype=torch.int32, device=top.device)
    steps = torch.arange(K, device=top.device)
    for part, maximum in zip(parts, maxima, strict=True):
        index = (steps + (order_key(top) - order_key(maximum) >> 16)).clamp_max(K)
        count.scatter_add_(1, index, part.entries.int())
    return _key_values(top, K), count[:, :K].to(top.dtype)


def _key_values(maximum: Tensor, K: int) -> Tensor:
    lowest = order_key(torch.full_like(maximum, -torch.inf))
    key = order_key(maximum) - (torch.arange(K, device=maximum.device) << 16)
    return from_order_key(torch.maximum(key, lowest), maximum.dtype)


def num_blocks(V: int) -> int:
    return V if V <= SMALL else -(-V // STRIDE)


def block_maxima(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``[T, V] -> [T, num_blocks(V)]``: the maximum of every block; a small shard's blocks are its columns."""
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
    """Those of logits ``[T, V]`` with their block maxima ``[T, n]`` and maximum ``top`` ``[T, 1]``.

    They end where the mass of the highest maxima leaves no more than ``mass.tail``, or after K blocks.
    """
    V, n = logits.shape[1], maxima.shape[1]
    if n <= K:
        return _from_values(logits.to(top.dtype), torch.full_like(top, -torch.inf), top, K, logits.dtype)
    block = highest_columns(maxima, K)
    blocks = Blocks(block.int(), maxima.gather(1, block))
    falling = highest(blocks.maxima, K)
    held = ((falling - top) * mass.scale).exp_().cumsum(-1) < (1 - mass.tail) * mass.total
    highest_missing = falling.gather(1, (held.sum(-1, keepdim=True) + 1).clamp_max(K - 1))
    token, chosen = (blocks.maxima >= highest_missing).nonzero(as_tuple=True)
    token, column = _members(token, block[token, chosen], n, V)
    value = logits[token, column].to(top.dtype)
    above = value > highest_missing[token, 0]
    return _from_values(_by_token(value[above], token[above], len(top)), highest_missing, top, K, logits.dtype, blocks)


def _from_values(
    values: Tensor, highest_missing: Tensor, top: Tensor, K: int, logits: torch.dtype, blocks: Blocks | None = None
) -> Candidates:
    """From ``values`` ``[T, n]``; ``highest_missing`` ``[T, 1]`` bounds what may be missing from them."""
    if values.shape[1] > 2 * K:  # counting costs more than leaving out
        values = highest(values, 2 * K, in_order=False)
        highest_missing = torch.maximum(highest_missing, values.amin(-1, keepdim=True))
    make = _count if logits == torch.bfloat16 else _list
    found = make(values, highest_missing, top, K)
    return Candidates(found.entries, found.floor, blocks)


def _by_token(value: Tensor, token: Tensor, T: int) -> Tensor:
    """``[n] -> [T, longest]``: the values of every token (``token`` ascends), then minus infinity."""
    count = torch.bincount(token, minlength=T)
    column = torch.arange(len(token), device=token.device) - (count.cumsum(0) - count)[token]
    values = torch.full((T, int(count.max())), -torch.inf, dtype=value.dtype, device=value.device)
    values[token, column] = value
    return values


def _list(values: Tensor, highest_missing: Tensor, top: Tensor, K: int) -> Candidates:
    entries = highest(values, min(K, values.shape[1]))
    missing = entries.new_full((len(entries), K - entries.shape[1]), -torch.inf)
    floor = torch.maximum(highest_missing, entries[:, -1:]) if values.shape[1] > K else highest_missing
    return Candidates(torch.cat([entries, missing], 1), floor)


def _count(values: Tensor, highest_missing: Tensor, top: Tensor, K: int) -> Candidates:
    """Logits at each of 2K keys from the maximum down; ``highest_missing`` is the highest that may be missing."""
    first = order_key(top)
    step = (first - order_key(values) >> 16).clamp_(0, 2 * K)
    step = torch.where(values > -torch.inf, step, 2 * K)
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


def _members(token: Tensor, block: Tensor, n: int, V: int) -> tuple[Tensor, Tensor]:
    """Token and column of every entry of the given blocks ``[m]``, n of which make the V columns of a token."""
    if n == V:
        return token, block
    column = (block[:, None] + torch.arange(0, STRIDE * n, n, device=block.device)).flatten()
    token = token[:, None].expand(-1, STRIDE).flatten()
    inside = column < V
    return token[inside], column[inside]


def in_nucleus(x: Tensor, theta: Tensor, keep_equal: bool) -> Tensor:
    """Mask of the logits above theta; those equal to it belong if ``keep_equal``."""
    return (x >= theta) & (x > -torch.inf) if keep_equal else x > theta


def positions_above(
    x: Tensor, tokens: Tensor, blocks: Blocks, theta: Tensor, keep_equal: bool
) -> tuple[Tensor, Tensor]:
    """Token and column of the entries of ``x`` ``[T, V]``, in the given ``tokens``, that are in the nucleus.

    Every such token's theta must be higher than the least of its blocks' maxima: nothing of its nucleus is elsewhere.
    """
    V, n = x.shape[1], num_blocks(x.shape[1])
    which, chosen = (blocks.maxima[tokens] >= theta[tokens]).nonzero(as_tuple=True)
    token = tokens[which]
    token, column = _members(token, blocks.block[token, chosen].long(), n, V)
    kept = in_nucleus(x[token, column], theta[token, 0], keep_equal)
    return token[kept], column[kept]

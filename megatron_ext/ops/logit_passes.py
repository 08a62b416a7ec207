"""The portable row work: one pass over a shard's logits forward, one backward, a block of rows in cache at a time.

Shapes: ``T`` rows, ``V`` the real columns of this shard. With m a row's maximum and d = (x - m) * scale, the forward
leaves (m, sum e^d, sum d e^d, x[target]) a row, m being the shard's, and the backward writes, m being the whole
row's,

    dx_j = e^d_j (a + b d_j) + 1[j in nucleus] e^d_j (a_n + b_n d_j) + 1[j = target] at_target

Powers of two stand in for e^d: torch's exp2 is four times as fast as its exp on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.ops.candidates import (
    Blocks,
    Candidates,
    Mass,
    block_maxima,
    in_nucleus,
    make_candidates,
    num_blocks,
    positions_above,
)

BLOCK = 1 << 18  # elements worked on in cache: 1 MiB in fp32
GROUP = 1 << 21  # block maxima held at once: their rows share the search for the highest logits
LOWEST = -1e30  # stands in for a minus infinity that would meet a zero
SPARSE = 1 / 32  # share of a row's columns in the nucleus below which they are visited one by one


class TokenGradient(NamedTuple):
    """The backward's numbers, ``[T, 1]`` each; the nucleus' are None where nothing flows through it."""

    maximum: Tensor
    a: Tensor
    b: Tensor | None
    at_target: Tensor
    nucleus: tuple[Tensor, Tensor] | None  # a_n, b_n
    theta: Tensor | None
    keep_equal: bool  # a logit equal to theta belongs to the nucleus
    size: Tensor | None  # tokens in the nucleus over all ranks
    blocks: Blocks | None  # where the forward found the highest logits of this shard, if it looked for them by blocks

    def through_nucleus(self, columns: int) -> tuple[Tensor, Tensor]:
        """``[T]`` twice: rows with a gradient through the nucleus whose nucleus is small and within the blocks at hand;
        all the others with one."""
        if self.nucleus is None or self.theta is None or self.size is None:
            none = torch.zeros(len(self.a), dtype=torch.bool)
            return none, none
        active = ((self.nucleus[0] != 0) | (self.nucleus[1] != 0))[:, 0]
        if self.blocks is None:
            return torch.zeros_like(active), active
        within = self.theta > self.blocks.maxima.amin(-1, keepdim=True)
        few = active & (within & (self.size <= SPARSE * columns))[:, 0]
        return few, active & ~few

    def rows(self, rows: slice) -> TokenGradient:
        nucleus = None if self.nucleus is None else (self.nucleus[0][rows], self.nucleus[1][rows])
        part = [None if v is None else v[rows] for v in (self.b, self.theta, self.size)]
        b, theta, size = part
        fixed = self.maximum[rows], self.a[rows], b, self.at_target[rows]
        blocks = None if self.blocks is None else self.blocks.rows(rows)
        return TokenGradient(*fixed, nucleus, theta, self.keep_equal, size, blocks)


def summarise(
    logits: Tensor,
    column: Tensor,
    scale: Tensor,
    real: int,
    *,
    moment: bool,
    num_candidates: int | None,
    tail: float = 0.0,
) -> tuple[Tensor, Candidates | None]:
    """``[T, 4]`` of (maximum, sum e^d, sum d e^d, logit of the target) and the highest logits of every row.

    ``column`` ``[T, 1]`` is the target's local column, -1 where it is another rank's; ``scale`` is 1 / temperature
    ``[T, 1]`` in the dtype of the arithmetic. Without ``moment`` the third number is 0; without
    ``num_candidates`` no highest logits are returned. ``tail`` is the share of the shard's mass that the candidates
    need not hold.
    """
    T, dtype = len(logits), scale.dtype
    sums = torch.zeros((T, 4), dtype=dtype, device=logits.device)
    sums[:, 0] = sums[:, 3] = -torch.inf
    if not real or not T:
        return sums, Candidates.empty(T, num_candidates, logits.dtype, dtype, logits.device) if num_candidates else None
    logits, scale2 = logits[:, :real], scale / math.log(2)
    at_target = logits.gather(1, column.clamp_min(0)).to(dtype)
    sums[:, 3:] = torch.where(column >= 0, at_target, -torch.inf)
    candidates, scratch = [], _scratch(logits, dtype)
    for group in _slices(0, T, GROUP // num_blocks(real)):
        all_maxima = sums.new_empty((group.stop - group.start, num_blocks(real))) if num_candidates else None
        for rows in _slices(group.start, group.stop, BLOCK // real):
            x, d, e = _block(logits[rows], scratch)
            maxima = x
            if all_maxima is not None:
                maxima = block_maxima(x, all_maxima[rows.start - group.start : rows.stop - group.start])
            top = maxima.amax(-1, keepdim=True)
            torch.sub(x, torch.where(top > -torch.inf, top, 0), out=d).mul_(scale2[rows])
            if moment:
                d.clamp_min_(LOWEST)
            torch.exp2(d, out=e)
            sums[rows, :1], sums[rows, 1] = top, e.sum(-1)
            if moment:
                sums[rows, 2] = e.mul_(d).sum(-1) * math.log(2)
        if all_maxima is not None and num_candidates:
            mass = Mass(sums[group, 1:2], scale[group], tail)
            candidates.append(make_candidates(logits[group], all_maxima, sums[group, :1], num_candidates, mass))
    return sums, Candidates.join(candidates) if candidates else None


def gradient(logits: Tensor, column: Tensor, scale: Tensor, real: int, row: TokenGradient, out: Tensor) -> None:
    """Write the gradient of the real columns to ``out`` (which may be ``logits``), zero to the padding."""
    out[:, real:] = 0
    if not real or not len(out):
        return
    logits, out = logits[:, :real], out[:, :real]
    scratch = _scratch(logits, scale.dtype)
    for group in _slices(0, len(out), GROUP // num_blocks(real)):
        part = row.rows(group)
        few, many = part.through_nucleus(real)
        for rows in _slices(0, len(few), BLOCK // real):
            dense = bool(many[rows].any())
            few[rows] &= not dense
            at = slice(group.start + rows.start, group.start + rows.stop)
            _dense(logits[at], column[at], scale[at], part.rows(rows), out[at], scratch, nucleus=dense)
        if few.any():
            at, value = _few(logits[group], few.nonzero()[:, 0], column[group], scale[group], part)
            out[group][at[0], at[1]] = value.to(out.dtype)


def _dense(
    logits: Tensor, column: Tensor, scale: Tensor, row: TokenGradient, out: Tensor, scratch: Tensor, *, nucleus: bool
) -> None:
    """The gradient of a block of rows; of the nucleus' part too if ``nucleus``."""
    x, d, e = _block(logits, scratch)
    within = row.nucleus if nucleus else None
    inside = extra = None
    if within is not None and row.theta is not None:
        inside = in_nucleus(x, row.theta, row.keep_equal)
    torch.sub(x, row.maximum, out=d).mul_(scale / math.log(2))
    if row.b is not None or within is not None:
        d.clamp_min_(LOWEST)
    torch.exp2(d, out=e)
    if within is not None and inside is not None:
        extra = torch.where(inside, (d * (within[1] * math.log(2))).add_(within[0]).mul_(e), 0)
    result = out if out.dtype == d.dtype else d
    if row.b is not None:
        torch.mul(d.mul_(row.b * math.log(2)).add_(row.a), e, out=result)
    else:
        torch.mul(e, row.a, out=result)
    if extra is not None:
        result += extra
    result.scatter_add_(1, column.clamp_min(0), torch.where(column >= 0, row.at_target, 0))
    if result is d:
        out.copy_(d)


def _few(logits: Tensor, index: Tensor, column: Tensor, scale: Tensor, row: TokenGradient) -> tuple[Tensor, Tensor]:
    """Rows and columns of the nucleus' entries, and the whole gradient at each: it replaces the dense part's."""
    assert row.theta is not None and row.nucleus is not None and row.blocks is not None
    at = positions_above(logits, index, row.blocks, row.theta, row.keep_equal)
    which = at[0]
    numbers = torch.cat([row.maximum, scale, row.a + row.nucleus[0], row.nucleus[1], row.at_target], 1)
    if row.b is not None:
        numbers[:, 3:4] += row.b
    maximum, factor, a, b, at_target = numbers[which].unbind(1)
    d = (logits[which, at[1]].to(scale.dtype) - maximum) * factor
    return at, d.exp() * (a + b * d) + torch.where(at[1] == column[which, 0], at_target, 0)


def _slices(start: int, stop: int, rows: int) -> Iterator[slice]:
    rows = max(1, rows)
    for first in range(start, stop, rows):
        yield slice(first, min(first + rows, stop))


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    rows = min(len(logits), max(1, BLOCK // logits.shape[1]))
    copies = 2 if logits.dtype == dtype else 3
    return torch.empty((copies, rows, logits.shape[1]), dtype=dtype, device=logits.device)


def _block(logits: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of rows in the dtype of the arithmetic, and two scratch tensors of its shape."""
    d, e, *copy = scratch[:, : len(logits)].unbind(0)
    return copy[0].copy_(logits) if copy else logits, d, e

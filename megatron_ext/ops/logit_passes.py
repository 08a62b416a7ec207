"""The portable passes over a shard's logits: one forward, one backward, a block of tokens in cache at a time.

Shapes: ``T`` tokens, ``V`` the real columns of this shard. With m a token's maximum and d = (x - m) * scale, the
forward leaves its ``ShardStats`` (m, sum e^d, sum d e^d, x[target]), m being the shard's, and the backward writes, m
being the whole vocabulary's,

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
    make_candidates,
    num_blocks,
    positions_above,
)
from megatron_ext.ops.stats import ShardStats

BLOCK = 1 << 18  # elements worked on in cache: 1 MiB in fp32
GROUP = 1 << 21  # block maxima held at once: their tokens share the search for the highest logits
LOWEST = -1e30  # stands in for a minus infinity that would meet a zero
SPARSE = 1 / 32  # share of a shard's columns in the nucleus below which they are visited one by one


class NucleusGradient(NamedTuple):
    """The backward's numbers of the nucleus, ``[T, 1]`` each."""

    a: Tensor
    b: Tensor
    theta: Tensor
    size: Tensor  # tokens of the vocabulary in it, over all ranks
    keep_equal: bool  # a logit equal to theta belongs to it
    blocks: Blocks | None  # where the forward found the highest logits of this shard, if it looked for them by blocks

    def few_and_many(self, columns: int) -> tuple[Tensor, Tensor]:
        """``[T]`` bool twice: tokens with a gradient through a small nucleus within the blocks, all others with one."""
        active = ((self.a != 0) | (self.b != 0))[:, 0]
        if self.blocks is None:
            return torch.zeros_like(active), active
        within = self.theta > self.blocks.maxima.amin(-1, keepdim=True)
        few = active & (within & (self.size <= SPARSE * columns))[:, 0]
        return few, active & ~few

    def tokens(self, tokens: slice) -> NucleusGradient:
        blocks = None if self.blocks is None else self.blocks.tokens(tokens)
        of_tokens = self.a[tokens], self.b[tokens], self.theta[tokens], self.size[tokens]
        return NucleusGradient(*of_tokens, self.keep_equal, blocks)


class TokenGradient(NamedTuple):
    """The backward's numbers, ``[T, 1]`` each; None where nothing flows through them."""

    maximum: Tensor
    a: Tensor
    b: Tensor | None
    at_target: Tensor
    nucleus: NucleusGradient | None

    def tokens(self, tokens: slice) -> TokenGradient:
        b = None if self.b is None else self.b[tokens]
        nucleus = None if self.nucleus is None else self.nucleus.tokens(tokens)
        return TokenGradient(self.maximum[tokens], self.a[tokens], b, self.at_target[tokens], nucleus)


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
    """Packed ``ShardStats`` ``[T, 4]`` and the candidates of every token.

    ``column`` ``[T, 1]`` is the target's local column, -1 where it is another rank's; ``scale`` is 1 / temperature
    ``[T, 1]`` in the dtype of the arithmetic. Without ``moment`` that sum is 0; without ``num_candidates`` there are
    no candidates. ``tail`` is the share of the shard's mass that the candidates need not hold.
    """
    T, dtype = len(logits), scale.dtype
    packed = torch.zeros((T, 4), dtype=dtype, device=logits.device)
    stats = ShardStats.unpack(packed)
    stats.maximum[:] = stats.target[:] = -torch.inf
    if not real or not T:
        none = Candidates.empty(T, num_candidates, logits.dtype, dtype, logits.device) if num_candidates else None
        return packed, none
    logits, scale2 = logits[:, :real], scale / math.log(2)
    at_target = logits.gather(1, column.clamp_min(0)).to(dtype)
    stats.target[:] = torch.where(column >= 0, at_target, -torch.inf)
    candidates, scratch = [], _scratch(logits, dtype)
    for group in _slices(0, T, GROUP // num_blocks(real)):
        all_maxima = packed.new_empty((group.stop - group.start, num_blocks(real))) if num_candidates else None
        for tokens in _slices(group.start, group.stop, BLOCK // real):
            x, d, e = _block(logits[tokens], scratch)
            maxima = x
            if all_maxima is not None:
                maxima = block_maxima(x, all_maxima[tokens.start - group.start : tokens.stop - group.start])
            top = maxima.amax(-1, keepdim=True)
            torch.sub(x, torch.where(top > -torch.inf, top, 0), out=d).mul_(scale2[tokens])
            if moment:
                d.clamp_min_(LOWEST)
            torch.exp2(d, out=e)
            stats.maximum[tokens], stats.total[tokens, 0] = top, e.sum(-1)
            if moment:
                stats.moment[tokens, 0] = e.mul_(d).sum(-1) * math.log(2)
        if all_maxima is not None and num_candidates:
            mass = Mass(stats.total[group], scale[group], tail)
            candidates.append(make_candidates(logits[group], all_maxima, stats.maximum[group], num_candidates, mass))
    return packed, Candidates.join(candidates) if candidates else None


def gradient(logits: Tensor, column: Tensor, scale: Tensor, real: int, token: TokenGradient, out: Tensor) -> None:
    """Write the gradient of the real columns to ``out`` (which may be ``logits``), zero to the padding."""
    out[:, real:] = 0
    if not real or not len(out):
        return
    logits, out = logits[:, :real], out[:, :real]
    scratch = _scratch(logits, scale.dtype)
    for group in _slices(0, len(out), GROUP // num_blocks(real)):
        part = token.tokens(group)
        if part.nucleus is None:
            few = many = torch.zeros(len(part.a), dtype=torch.bool)
        else:
            few, many = part.nucleus.few_and_many(real)
        blocks = [(tokens, bool(many[tokens].any())) for tokens in _slices(0, len(few), BLOCK // real)]
        for tokens, dense in blocks:
            few[tokens] &= not dense
        found = None
        if few.any():  # read before the logits are overwritten, where they are ``out``
            found = _few(logits[group], few.nonzero()[:, 0], column[group], scale[group], part)
        for tokens, dense in blocks:
            at = slice(group.start + tokens.start, group.start + tokens.stop)
            block = part.tokens(tokens)
            block = block if dense else block._replace(nucleus=None)
            _dense(logits[at], column[at], scale[at], block, out[at], scratch)
        if found is not None:
            at, value = found
            out[group][at] = value.to(out.dtype)


def _dense(logits: Tensor, column: Tensor, scale: Tensor, token: TokenGradient, out: Tensor, scratch: Tensor) -> None:
    """The gradient of a block of tokens at every column."""
    x, d, e = _block(logits, scratch)
    nucleus, extra = token.nucleus, None
    if nucleus is not None:  # 0 and 1, in numbers: a product takes a fraction of torch.where's time
        compare = torch.ge if nucleus.keep_equal else torch.gt
        extra = compare(x, nucleus.theta, out=torch.empty_like(e))
    torch.sub(x, token.maximum, out=d).mul_(scale / math.log(2))
    if token.b is not None or nucleus is not None:
        d.clamp_min_(LOWEST)
    torch.exp2(d, out=e)
    if nucleus is not None and extra is not None:
        extra.mul_(e).mul_((d * (nucleus.b * math.log(2))).add_(nucleus.a))
    result = out if out.dtype == d.dtype else d
    if token.b is not None:
        torch.mul(d.mul_(token.b * math.log(2)).add_(token.a), e, out=result)
    else:
        torch.mul(e, token.a, out=result)
    if extra is not None:
        result += extra
    result.scatter_add_(1, column.clamp_min(0), torch.where(column >= 0, token.at_target, 0))
    if result is d:
        out.copy_(d)


def _few(
    logits: Tensor, tokens: Tensor, column: Tensor, scale: Tensor, token: TokenGradient
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Token and column of every entry of the nuclei of ``tokens``, and the whole gradient there: it replaces the dense
    one."""
    nucleus = token.nucleus
    assert nucleus is not None and nucleus.blocks is not None
    at = positions_above(logits, tokens, nucleus.blocks, nucleus.theta, nucleus.keep_equal)
    which, columns = at
    b = nucleus.b if token.b is None else nucleus.b + token.b
    numbers = torch.cat([token.maximum, scale, token.a + nucleus.a, b, token.at_target], 1)
    maximum, factor, a, b, at_target = numbers[which].unbind(1)
    d = (logits[which, columns].to(scale.dtype) - maximum) * factor
    return at, d.exp() * (a + b * d) + torch.where(columns == column[which, 0], at_target, 0)


def _slices(start: int, stop: int, tokens: int) -> Iterator[slice]:
    tokens = max(1, tokens)
    for first in range(start, stop, tokens):
        yield slice(first, min(first + tokens, stop))


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    tokens = min(len(logits), max(1, BLOCK // logits.shape[1]))
    copies = 2 if logits.dtype == dtype else 3
    return torch.empty((copies, tokens, logits.shape[1]), dtype=dtype, device=logits.device)


def _block(logits: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of tokens in the dtype of the arithmetic, and two scratch tensors of its shape."""
    d, e, *copy = scratch[:, : len(logits)].unbind(0)
    return copy[0].copy_(logits) if copy else logits, d, e

"""Sequences -> packed micro-batches under a token budget.

The responses of a group have one prompt. Where the attention knows trees (``PackedSequences``), it is read once for as
many of them as pays: each token's place in the layers costs about 6 D times what it costs to be looked at by one other
token, D the hidden size, and under a mask all tokens of a tree look at one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_ext.kept_tokens import KeptTokens, PackedSupport, Restriction
from megatron_ext.model import zigzag
from megatron_ext.types import Batch, PackedSequences

Pair = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids


@dataclass(frozen=True)
class MiniBatch:
    """The sequences of one mini-batch in packed micro-batches, and the way there and back.

    ``sequences`` are each micro-batch's, by their index in the mini-batch.
    """

    sequences: tuple[tuple[int, ...], ...]
    micro_batches: tuple[PackedSequences, ...]

    @classmethod
    def pack(
        cls,
        pairs: Sequence[Pair],
        bins: Sequence[Sequence[int]],
        *,
        multiple: int = 1,
        chunks: int = 1,
        width: int = 0,
        routing: Sequence[np.ndarray | None] | None = None,
    ) -> MiniBatch:
        """One micro-batch of each of the ``bins``, whose indices count in ``pairs`` and, if given, in ``routing``."""
        packed = [pack([pairs[i] for i in each], multiple=multiple, chunks=chunks, width=width) for each in bins]
        if routing is not None:
            parts = zip(packed, bins, strict=True)
            packed = [replace(part, routing=lay_out_routing([routing[i] for i in each], part)) for part, each in parts]
        return cls(tuple(map(tuple, bins)), tuple(packed))

    def with_support(self, restriction: Restriction, supports: Sequence[KeptTokens | None]) -> MiniBatch:
        """With what the sampler kept for the tokens of each response of the mini-batch; None: it is not known."""

        def joined(sequences: Sequence[int], packed: PackedSequences) -> PackedSupport:
            lengths = dict(zip(sequences, packed.response_lengths, strict=True))
            kept = [supports[i] or KeptTokens.empty(lengths[i]) for i in sequences]
            unknown = np.repeat([supports[i] is None for i in sequences], [lengths[i] for i in sequences]).astype(bool)
            return PackedSupport.recorded(restriction, KeptTokens.join(kept), unknown, packed.targets.numpy())

        pairs = zip(self.sequences, self.micro_batches, strict=True)
        replayed = tuple(replace(packed, support=joined(sequences, packed)) for sequences, packed in pairs)
        return replace(self, micro_batches=replayed)

    def cut(self, rank: int, size: int) -> MiniBatch:
        """The part of context-parallel rank ``rank`` of ``size``. What is split and joined stays whole."""
        if size == 1:
            return self
        return replace(self, micro_batches=tuple(zigzag.cut(packed, rank, size) for packed in self.micro_batches))

    @property
    def num_tokens(self) -> int:
        """Tokens that all its passes read, padding among them."""
        return sum(len(packed.tokens) for packed in self.micro_batches)

    @property
    def is_support_known(self) -> bool:
        """Whether no pass has to find out what the sampler kept."""
        return all(packed.support is None or packed.support.is_known for packed in self.micro_batches)

    def split(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """Each micro-batch's part of the mini-batch's ``batch``, and the positions of its tokens in that."""
        return [batch.select(each) for each in self.sequences]

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """``[T]`` in the order of the mini-batch's tokens, from each micro-batch's values."""
        joined = torch.cat(list(values))
        return joined[self._positions.to(joined.device)]

    @cached_property
    def _positions(self) -> Tensor:
        """Where each response token of the mini-batch stands in its micro-batches laid end to end, ``[T]``."""
        starts: dict[int, tuple[int, int]] = {}
        offset = 0
        for sequences, packed in zip(self.sequences, self.micro_batches, strict=True):
            for sequence, length in zip(sequences, packed.response_lengths, strict=True):
                starts[sequence] = (offset, length)
                offset += length
        return torch.cat([torch.arange(start, start + length) for _, (start, length) in sorted(starts.items())])


def num_read(pair: Pair) -> int:
    """Tokens of a sequence that the model reads: a response's last one predicts nothing."""
    return len(pair[0]) + max(0, len(pair[1]) - 1)


def padded(num_tokens: int, chunks: int) -> int:
    """A sequence's tokens once it is padded to be cut into ``chunks`` of equal length."""
    return -(-num_tokens // chunks) * chunks


def trees(
    pairs: Sequence[Pair], width: int, budget: float = math.inf, chunks: int = 1
) -> Iterator[tuple[list[int], int]]:
    """Runs of sequences that share their prompt, with the number of tokens of each, at most ``budget`` where it has
    several. ``width`` is the hidden size; 0: nothing is shared, and each sequence is padded to be cut."""
    members, size = list[int](), 0
    for i, (prompt, response) in enumerate(pairs):
        own = padded(num_read((prompt, response)), chunks)
        more = own - len(prompt)
        shares = width > 0 and members and pairs[i - 1][0] == prompt and size + more <= budget
        if shares and (size + more) ** 2 - size**2 <= own**2 + 6 * width * len(prompt):
            members.append(i)
            size += more
            continue
        if members:
            yield members, size
        members, size = [i], own
    if members:
        yield members, size


def split(
    pairs: Sequence[Pair],
    budget: int,
    num_bins: int = 1,
    *,
    width: int = 0,
    chunks: int = 1,
    cost: Callable[[int], float] = float,
) -> list[list[int]]:
    """Divide sequences into at least ``num_bins`` bins of at most ``budget`` tokens each; trees stay whole.

    Longest first into the bin that costs least by ``cost`` of each tree's tokens and has room (the stages of a
    pipeline, and the ranks that share experts, wait for the longest); the number of bins is the smallest at which that
    fits. Within a bin the sequences keep their order. Bins may be empty. Nothing is shared where there are fewer trees
    than bins. Raises ValueError for a sequence longer than the budget.
    """
    found = list(trees(pairs, width, budget, chunks))
    if len(found) < num_bins:
        found = list(trees(pairs, 0, chunks=chunks))
    if found and max(size for _, size in found) > budget:
        raise ValueError(
            f"micro_batch_tokens: {budget} cannot hold a sequence of {max(size for _, size in found)} tokens"
        )
    num_bins = max(num_bins, -(-sum(size for _, size in found) // budget))
    order = sorted(range(len(found)), key=lambda i: (-found[i][1], i))
    while (bins := _divide([found[i] for i in order], budget, num_bins, cost)) is None:
        num_bins += 1
    return bins


def neighbours(sizes: Sequence[int], budget: int) -> list[range]:
    """One or more parts of ``sizes`` tokens, in order, of which there is one at least: as many as ``budget`` holds."""
    spans, start, total = list[range](), 0, 0
    for number, size in enumerate(sizes):
        if number > start and total + size > budget:
            spans.append(range(start, number))
            start, total = number, 0
        total += size
    return [*spans, range(start, len(sizes))]


def _divide(
    found: Sequence[tuple[list[int], int]], budget: int, num_bins: int, cost: Callable[[int], float]
) -> list[list[int]] | None:
    """Each of the trees, in order, into the cheapest bin with room; None where one finds none."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, load = [0] * num_bins, [0.0] * num_bins
    for members, size in found:
        with_room = [number for number in range(num_bins) if tokens[number] + size <= budget]
        if not with_room:
            return None
        cheapest = min(with_room, key=lambda number: (load[number], number))
        bins[cheapest] += members
        tokens[cheapest] += size
        load[cheapest] += cost(size)
    return [sorted(bin) for bin in bins]


def pack(pairs: Sequence[Pair], *, multiple: int = 1, chunks: int = 1, width: int = 0) -> PackedSequences:
    """Lay ``(prompt_ids, response_ids)`` pairs end to end, those of ``trees`` with one prompt; pad with one dummy
    sequence to ``multiple`` tokens. ``chunks``, which divides ``multiple``, divides the length of each sequence too:
    it is padded at its end.

    The response token at position t is predicted at t - 1, so ``logit_positions`` starts at the last prompt token.
    """
    tokens, position, branch, logit_positions, starts = list[int](), list[int](), list[int](), list[int](), [0]
    for members, _ in trees(pairs, width):
        prompt = pairs[members[0]][0]
        last = len(tokens) + len(prompt) - 1
        tokens += prompt
        position += range(len(prompt))
        branch += [0] * len(prompt)
        for number, i in enumerate(members, 1):
            response = pairs[i][1]
            logit_positions += [last, *range(len(tokens), len(tokens) + len(response) - 1)][: len(response)]
            tokens += response[:-1]
            position += range(len(prompt), num_read(pairs[i]))
            branch += [number] * (len(tokens) - len(branch))
        if gap := -(len(tokens) - starts[-1]) % chunks:
            tokens += [0] * gap
            position += range(position[-1] + 1, position[-1] + 1 + gap)
            branch += [0] * gap
        starts.append(len(tokens))
    padding = -len(tokens) % multiple or (multiple if not tokens else 0)
    if padding:
        tokens += [0] * padding
        position += range(padding)
        branch += [0] * padding
        starts.append(len(tokens))
    return PackedSequences(
        tokens=torch.tensor(tokens),
        position=torch.tensor(position),
        starts=torch.tensor(starts, dtype=torch.int32),
        logit_positions=torch.tensor(logit_positions, dtype=torch.int64),
        targets=torch.tensor([token for _, response in pairs for token in response], dtype=torch.int64),
        response_lengths=tuple(len(response) for _, response in pairs),
        branch=torch.tensor(branch) if max(branch) > 1 else None,
    )


def lay_out_routing(routing: Sequence[np.ndarray | None], packed: PackedSequences) -> Tensor | None:
    """``PackedSequences.routing``, ``[S, layers, top_k]``, from the experts of each sequence (``Sample.routing``).

    None where they are known of no sequence. Those of padding are not known.
    """
    known = [(start, each) for start, each in zip(packed.starts.tolist(), routing, strict=False) if each is not None]
    if not known:
        return None
    experts = np.full((len(packed.tokens), *known[0][1].shape[1:]), -1, dtype=np.int16)
    for start, each in known:
        experts[start : start + len(each)] = each
    return torch.from_numpy(experts)

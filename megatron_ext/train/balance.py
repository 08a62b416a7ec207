"""Which data-parallel rank trains on which groups, so that none waits long for another.

All ranks wait for the one with the most work: after every update, since each needs the sum of all gradients, and after
the passes before the first one. A sequence costs what the planner counts for its forward, linear in its tokens for the
products with weights and quadratic for attention. Groups stay whole on a rank: their
statistics need all of their responses. Token weights are fixed before, from counts over all ranks (token_weights.py),
so who trains on what changes the order of summation and nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from megatron_ext.model.architectures import Architecture
from megatron_ext.plan.speed import forward_flops


def sequence_cost(architecture: Architecture) -> Callable[[int], int]:
    """Operations of a sequence's forward by its number of tokens."""
    linear = int(forward_flops(architecture, 0))
    quadratic = int(forward_flops(architecture, 1)) - linear
    return lambda tokens: tokens * (linear + quadratic * tokens)


def longest_first(costs: Sequence[float], num_bins: int) -> list[int]:
    """The bin of each item by the rule of the longest processing time: the costliest first, to the lightest bin.

    The heaviest bin has at most 4/3 - 1/(3 num_bins) of what it has at the best division (Graham, SIAM J. Appl. Math.
    17, 1969). With costs above 0 no bin stays empty where there are as many items.
    """
    heap, bins = [(0.0, number) for number in range(num_bins)], [0] * len(costs)  # the lightest is on top
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, bins[item] = heap[0]
        heapq.heapreplace(heap, (load + costs[item], bins[item]))
    return bins


def deal(costs: Sequence[float], mini_batch: int, num_ranks: int, *, first: int) -> list[int]:
    """The rank that trains on each of a step's groups, the next ``mini_batch`` of which make a mini-batch.

    Each mini-batch is divided for itself. Its heaviest share goes to the rank that has least of the step so far: before
    the first update the ranks read all mini-batches and meet once. Of equal ranks the ``first`` comes first: the number
    of the step, so that no rank has the heaviest share in all of them.
    """
    owners, total = list[int](), [0.0] * num_ranks
    for start in range(0, len(costs), mini_batch):
        part = costs[start : start + mini_batch]
        bins = longest_first(part, num_ranks)
        load = loads(part, bins, num_ranks)
        heaviest = sorted(range(num_ranks), key=lambda number: (-load[number], number))
        idlest = sorted(range(num_ranks), key=lambda rank: (total[rank], (rank - first) % num_ranks))
        rank_of = dict(zip(heaviest, idlest, strict=True))
        for number, rank in rank_of.items():
            total[rank] += load[number]
        owners += [rank_of[number] for number in bins]
    return owners


def loads(costs: Sequence[float], owners: Sequence[int], num_ranks: int) -> list[float]:
    """The cost of all that each rank has."""
    load = [0.0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        load[owner] += cost
    return load


def imbalance(costs: Sequence[float], owners: Sequence[int], mini_batch: int, num_ranks: int) -> float:
    """The busiest rank's work over the mean of all, averaged over mini-batches: 1 is balance."""
    ratios = []
    for start in range(0, len(costs), mini_batch):
        part = slice(start, start + mini_batch)
        load = loads(costs[part], owners[part], num_ranks)
        ratios.append(max(load) * num_ranks / sum(load))
    return sum(ratios) / len(ratios)


def least_longest(costs: Sequence[float], num_ranks: int) -> float:
    """A bound that the busiest rank's work is not below, however items are divided.

    The mean; the costliest item; and the two cheapest of the ``num_ranks + 1`` costliest, two of which share a rank.
    """
    ordered = sorted(costs, reverse=True)
    two = ordered[num_ranks - 1] + ordered[num_ranks] if len(ordered) > num_ranks else 0.0
    return max(sum(ordered) / num_ranks, ordered[0], two)

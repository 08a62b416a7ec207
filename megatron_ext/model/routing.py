"""Routing replay: a policy's routers choose the experts that the rollout engine chose for the same tokens.

    i_t = the engine's experts of token t, where it told them; else top_k(s_t)       s [tokens, experts], the scores
    gates and their gradient: the router's own, of s_t at i_t                        no gradient passes through i_t

Engine and trainer compute ``s`` with other kernels or in another precision. Where two experts score almost the same,
top-k then sends a token through other experts, and its log-prob is that of another function (R3, arXiv 2510.11370).

Megatron-Core has a hook for it, ``router_replay`` of a router, but the class it puts there does not fit
(transformer/moe/router_replay.py). It keeps all routers in one global list, also those of the reference and the critic,
which must choose for themselves. It wants experts for every token, and padding has none. And a switch tells it whether
a forward is a recomputation, for which pipeline schedules, where forward and backward take turns, have no place.
``RoutingReplay`` stands behind the same hook instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.model import groups
from megatron_ext.types import PackedSequences

TopK = Callable[..., tuple[Tensor, Tensor]]  # (scores [tokens, experts], top_k, ...) -> scores and experts of the top-k


class RoutingReplay:
    """What one router chooses its experts by, in each forward and again where backward repeats it.

    Megatron's schedules take the backwards of a model chunk in the order of its forwards, so ``kept`` is a queue.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=cpu_compat.device())  # tokens that differ, tokens known
        self.kept: deque[Tensor | None] = deque()  # experts of the forwards that backward will repeat
        self._given: Tensor | None = None  # [tokens, top_k] of the forward that runs, -1 where the engine told none
        self._in_forward = self._repeats = False

    def begin(self, given: Tensor | None, *, repeats: bool) -> None:
        """A forward of the router's model chunk begins. ``repeats``: backward will run it again."""
        self._given, self._in_forward, self._repeats = given, True, repeats

    def end(self) -> None:
        self._given, self._in_forward = None, False

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Scores and experts ``[tokens, top_k]`` of every token: Megatron-Core's hook, with its names."""
        given = self._given if self._in_forward else self.kept.popleft()
        if self._in_forward and self._repeats:
            self.kept.append(given)
        if given is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        with torch.no_grad():
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            known = given >= 0
            chosen = torch.where(known, given.long(), own)
            if self._in_forward:
                differs = (own.sort(-1).values != chosen.sort(-1).values).any(-1)
                self.counts += torch.stack([differs.sum(), known[:, 0].sum()])
        return scores.gather(1, chosen), chosen


class PolicyRouting:
    """The routers of this rank's chunks of a policy, each with a ``RoutingReplay``."""

    def __init__(self, modules: Sequence[GPTModel]) -> None:
        self._sequence = modules[0].config.sequence_parallel
        self._recomputes = modules[0].config.recompute_granularity is not None
        self._chunks = [_place_replays(module) for module in modules]

    @contextmanager
    def replayed(self, chunk: int, micro_batch: PackedSequences, *, with_grad: bool) -> Iterator[None]:
        """Within, the forward of chunk number ``chunk`` takes the experts of the micro-batch's tokens."""
        layers, given = list(self._chunks[chunk]), None
        if micro_batch.routing is not None:
            given = self._own_tokens(micro_batch.routing)[:, layers].to(cpu_compat.device())
        replays = self._chunks[chunk].values()
        for number, replay in enumerate(replays):
            own = None if given is None else given[:, number]
            replay.begin(own, repeats=with_grad and self._recomputes)
        try:
            yield
        finally:
            for replay in replays:
                replay.end()

    def begin_pass(self) -> None:
        """Forget what an interrupted pass has left."""
        for replay in self._replays():
            replay.kept.clear()

    def begin_count(self) -> None:
        """``differing`` counts from here on."""
        for replay in self._replays():
            replay.counts.zero_()

    def differing(self) -> float:
        """Of the (token, layer) pairs with experts of the engine, the share where they are not the router's own top-k
        of the same scores, as sets. Collective over all ranks; 0 where there are none."""
        total = torch.zeros(2, dtype=torch.int64, device=cpu_compat.device())
        for replay in self._replays():
            total += replay.counts
        dist.all_reduce(total)
        differing, known = total.tolist()
        return differing / max(known, 1)

    def _replays(self) -> Iterator[RoutingReplay]:
        for chunk in self._chunks:
            yield from chunk.values()

    def _own_tokens(self, routing: Tensor) -> Tensor:
        """``[S, ...]`` to the tokens that this rank's routers see: under sequence parallelism a part of them."""
        if not self._sequence:
            return routing
        return routing.chunk(groups.tensor().size())[groups.tensor().rank()]


def _place_replays(module: GPTModel) -> dict[int, RoutingReplay]:
    """Put one before each router of the module; by the layer's number in the whole model, from 0."""
    found: dict[int, RoutingReplay] = {}
    for each in module.modules():
        if isinstance(each, TopKRouter):
            router: Any = each
            router.router_replay = found[router.layer_number - 1] = RoutingReplay()
    return found

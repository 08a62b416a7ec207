"""A step's episodes in the packed mini-batches of its updates: as many micro-batches on every rank."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

from megatron_ext.config.schema import Config
from megatron_ext.kept_tokens import Restriction
from megatron_ext.model import parallel
from megatron_ext.model.build import Policy
from megatron_ext.train import packing, routing
from megatron_ext.train.balance import sequence_cost
from megatron_ext.train.packing import MiniBatch
from megatron_ext.types import Episode


@dataclass(frozen=True)
class Packer:
    """Cuts and packs what ``policy`` trains on, and what models of its layout read."""

    config: Config
    policy: Policy

    def spans(self, episodes: Sequence[Episode]) -> list[range]:
        """Where those of each mini-batch are: its groups are numbered one after another over all ranks."""
        size, updates = self.config.train.mini_batch_prompts, self.config.updates_per_step
        ends = [bisect_left(episodes, size * number, key=lambda each: each.group) for number in range(1, updates)]
        return [range(start, end) for start, end in pairwise([0, *ends, len(episodes)])]

    def pack(self, parts: Sequence[Sequence[Episode]]) -> list[MiniBatch]:
        """The episodes of each mini-batch in micro-batches; as many on every rank. Of each this rank's part."""
        pairs = [[(e.sample.prompt_ids, e.sample.response_ids) for e in episodes] for episodes in parts]
        train, layout = self.config.train, self.config.parallel
        width = self.policy.architecture.hidden_size if train.share_prompts and self.policy.can_share_prompts else 0
        cost = sequence_cost(self.policy.architecture)
        divide = partial(packing.split, budget=train.micro_batch_tokens, width=width, chunks=layout.chunks, cost=cost)
        bins, counts = [divide(each) for each in pairs], [0] * len(pairs)
        while (needed := parallel.num_micro_batches(list(map(len, bins)), layout)) != counts:
            bins = [divide(each, num_bins=count) for each, count in zip(pairs, needed, strict=True)]
            counts = needed  # no longer sharing prompts may take more
        form, packed = {"multiple": layout.token_multiple, "chunks": layout.chunks, "width": width}, []
        for episodes, own, chosen in zip(parts, pairs, bins, strict=True):
            told = routing.of_episodes(episodes, self.policy)
            packed.append(self._own_part(MiniBatch.pack(own, chosen, routing=told, **form), episodes))
        return packed

    def joined_neighbours(self, parts: Sequence[Sequence[Episode]], mini_batches: list[MiniBatch]) -> list[MiniBatch]:
        """``mini_batches``, packed of ``parts``, for passes without gradient: neighbours are one where the largest of
        each over the ranks fit into one micro-batch together.

        Under sampling replay none are: what a pass finds that the sampler kept stays with the update's micro-batches.
        """
        if self.config.rollout.replays_sampling or len(parts) < 2:
            return mini_batches
        context, budget = self.config.parallel.context, self.config.train.micro_batch_tokens
        sizes = parallel.max_over_ranks([each.num_tokens * context for each in mini_batches])
        spans = packing.neighbours(sizes, budget)
        joint = [list(chain.from_iterable(parts[i] for i in span)) for span in spans if len(span) > 1]
        packed = iter(self.pack(joint) if joint else [])
        return [next(packed) if len(span) > 1 else mini_batches[span[0]] for span in spans]

    def _own_part(self, packed: MiniBatch, episodes: Sequence[Episode]) -> MiniBatch:
        """This context-parallel rank's part of a mini-batch, with what its sampler kept where that is replayed."""
        rollout = self.config.rollout
        if rollout.replays_sampling:
            restriction = Restriction(rollout.top_k, rollout.top_p, rollout.min_p)
            packed = packed.with_support(restriction, [e.sample.support for e in episodes])
        return packed.cut(parallel.context_rank(), self.config.parallel.context)

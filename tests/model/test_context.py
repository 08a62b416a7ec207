"""Context parallelism: the cut of packed sequences and its inverse, and attention over keys of all ranks."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.kept_tokens import KeptTokens, PackedSupport, Restriction
from megatron_ext.model import context, groups, layers, parallel, zigzag
from megatron_ext.train.collect_rollouts import gathered
from megatron_ext.train.packing import MiniBatch, Pair, lay_out_routing, pack, split
from megatron_ext.types import PackedSequences
from tests import gloo


def some_pairs(seed: int, count: int = 5) -> list[Pair]:
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(1, 90) for _ in range(draw.randint(1, 9))],
            [draw.randrange(1, 90) for _ in range(draw.randint(0, 12))],
        )
        for _ in range(count)
    ]


def whole_of(pairs: list[Pair], size: int, tensor: int = 1) -> PackedSequences:
    layout = ParallelConfig(ranks_per_node=size * tensor, context=size, tensor=tensor, sequence=tensor > 1)
    return pack(pairs, multiple=layout.token_multiple, chunks=layout.chunks)


def test_a_rank_has_a_chunk_from_the_front_and_its_mirror() -> None:
    starts = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert zigzag.own_tokens(starts, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]  # the example of Transformer Engine's docs
    assert zigzag.own_tokens(starts, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag.own_tokens(torch.tensor([0, 16]), 2, 4).tolist() == [4, 5, 10, 11]
    assert zigzag.own_tokens(starts, 0, 1).tolist() == list(range(12))


@pytest.mark.parametrize("size", [2, 4])
def test_every_token_is_on_one_rank_and_attention_costs_all_the_same(size: int) -> None:
    for seed in range(20):
        whole = whole_of(some_pairs(seed), size)
        parts = [zigzag.own_tokens(whole.starts, rank, size) for rank in range(size)]
        assert torch.cat(parts).sort().values.tolist() == list(range(len(whole.tokens)))
        assert len({len(part) for part in parts}) == 1
        assert len({int((whole.position[part] + 1).sum()) for part in parts}) == 1


@pytest.mark.parametrize(("size", "tensor"), [(2, 1), (4, 1), (2, 2), (2, 4)])
def test_a_micro_batch_is_the_sum_of_its_parts(size: int, tensor: int) -> None:
    """Each part's positions predict its targets, and all parts in order are the whole's targets."""
    for seed in range(20):
        pairs = some_pairs(seed)
        whole, plain = whole_of(pairs, size, tensor), pack(pairs)
        assert whole.targets.equal(plain.targets) and whole.response_lengths == plain.response_lengths
        parts = [zigzag.cut(whole, rank, size) for rank in range(size)]
        assert {len(part.tokens) % tensor for part in parts} == {0}
        for rank, part in enumerate(parts):
            own = zigzag.own_tokens(whole.starts, rank, size)
            assert part.tokens.equal(whole.tokens[own]) and part.position.equal(whole.position[own])
            assert part.context is not None and part.context.counts[rank] == len(part.targets)
            assert len(part.logit_positions) == len(part.targets)
            assert set(own[part.logit_positions].tolist()) <= set(whole.logit_positions.tolist())
        assert parts[0].context is not None
        joined = torch.cat([part.targets for part in parts])[parts[0].context.order]
        assert joined.equal(whole.targets)
        predicting = torch.cat(
            [
                zigzag.own_tokens(whole.starts, rank, size)[part.logit_positions]  # where they are in the whole
                for rank, part in enumerate(parts)
            ]
        )
        assert predicting[parts[0].context.order].equal(whole.logit_positions)


def test_padding_ends_each_sequence_and_counts_against_the_budget() -> None:
    pairs: list[Pair] = [((1, 2, 3), (4, 5, 6)), ((7,), (8,))]
    packed = pack(pairs, multiple=8, chunks=4)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]
    assert packed.position.tolist() == [*range(8), *range(4), *range(4)]
    assert packed.starts.tolist() == [0, 8, 12, 16] and packed.logit_positions.tolist() == [2, 3, 4, 8]
    assert split(pairs, 12, chunks=4) == [[0, 1]] and sorted(split(pairs, 11, chunks=4)) == [[0], [1]]
    with pytest.raises(ValueError, match="7 cannot hold a sequence of 8 tokens"):
        split(pairs, 7, chunks=4)
    assert len(pack([], multiple=8, chunks=4).tokens) == 8


def test_experts_and_what_the_sampler_kept_go_with_their_tokens() -> None:
    draw, pairs = np.random.default_rng(0), some_pairs(3)
    plain, whole = pack(pairs), whole_of(pairs, 2)
    experts = [draw.integers(0, 9, (max(0, len(p) + len(r) - 1), 3, 2)) for p, r in pairs]
    routing = lay_out_routing(experts, whole)
    assert routing is not None
    lists = [sorted({int(target), int(target) + 5, int(target) + 7}) for target in plain.targets]
    known = draw.random(len(lists)) < 0.6
    kept = KeptTokens.of_lists([ids if told else [] for ids, told in zip(lists, known, strict=True)])
    support = PackedSupport.recorded(Restriction(top_k=3), kept, ~known, plain.targets.numpy())
    whole = PackedSequences(**{**vars(whole), "routing": routing, "support": support})
    for rank in range(2):
        part = zigzag.cut(whole, rank, 2)
        assert part.routing is not None and part.support is not None
        assert part.routing.equal(routing[zigzag.own_tokens(whole.starts, rank, 2)])
        ends = part.support.kept.starts
        for number, target in enumerate(part.targets.tolist()):
            ids = part.support.kept.ids[ends[number] : ends[number + 1]].tolist()
            assert ids == ([] if part.support.unknown[number] else [target, target + 5, target + 7])
        found = KeptTokens.of_lists([[target, target + 1] for target in part.targets.tolist()])
        part.support.fill(found, part.targets.numpy())
        assert part.support.is_known and not support.is_known  # the part is one of its own


def test_a_mini_batch_that_is_cut_joins_whole_values() -> None:
    pairs = some_pairs(1, 6)
    plain = MiniBatch.pack(pairs, [[0, 3], [1, 2, 4, 5]])
    cut = MiniBatch.pack(pairs, [[0, 3], [1, 2, 4, 5]], multiple=4, chunks=4).cut(1, 2)
    values = [each.targets for each in plain.micro_batches]
    assert cut.join(values).equal(plain.join(values))
    assert plain.cut(0, 1) is plain


def own_part(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """What ``whole`` gives of squares of the own targets, and the gradient of a sum with other weights each."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, context=world))
    part = zigzag.cut(whole_of(some_pairs(5), world), rank, world)
    own = part.targets.double().requires_grad_()
    found = context.whole(own**2, part.context)
    (found * torch.arange(len(found))).sum().backward()
    assert own.grad is not None
    return found.detach(), own.grad


def test_statistics_are_whole_on_every_rank_and_gradients_stay_with_their_tokens() -> None:
    whole = whole_of(some_pairs(5), 2)
    expected = 2 * whole.targets.double() * torch.arange(len(whole.targets))
    parts = [zigzag.cut(whole, rank, 2) for rank in range(2)]
    found = gloo.run(own_part, 2)
    for values, _ in found:
        assert values.equal(whole.targets.double() ** 2)
    assert parts[0].context is not None
    assert torch.cat([gradient for _, gradient in found])[parts[0].context.order].equal(expected)


def sampling_groups(rank: int, world: int) -> tuple[int, list[int], int]:
    """Data-parallel ranks, whose objects the ranks with the same sequences have, and the largest number of any rank."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, context=world))
    found = gathered({rank: rank}, parallel.same_sequences())
    return groups.data().size(), sorted(found), parallel.max_over_ranks([rank])[0]


def test_ranks_that_share_sequences_sample_together_and_are_one_data_parallel_rank() -> None:
    assert gloo.run(sampling_groups, 2) == [(1, [0, 1], 1)] * 2


def nothing_to_predict(rank: int, world: int) -> tuple[int, bool]:
    """A micro-batch without responses, and one whose response tokens are all on one rank."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, context=world))
    empty = zigzag.cut(pack([], multiple=4, chunks=4), rank, world)
    own = torch.zeros(0, requires_grad=True)
    single = zigzag.cut(pack([((1,), (2,))], multiple=4, chunks=4), rank, world)
    value = torch.full((len(single.targets),), 3.0, requires_grad=True)
    found = context.whole(value, single.context)
    found.sum().backward()
    return len(context.whole(own, empty.context)), found.tolist() == [3.0] and value.grad is not None


def test_a_rank_may_have_no_response_token() -> None:
    assert gloo.run(nothing_to_predict, 2) == [(0, True)] * 2


QUERY, GROUPS, WIDTH = 4, 2, 8


def some_qkv(tokens: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    heads = (QUERY, GROUPS, GROUPS)
    return [torch.randn(tokens, n, WIDTH, dtype=torch.float64, generator=draw) for n in heads]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """Sequence by sequence, with the softmax written out."""
    found = []
    for first, last in zip(starts, starts[1:], strict=False):
        keys, values = (x[first:last].repeat_interleave(QUERY // GROUPS, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[first:last], keys) / WIDTH**0.5
        seen = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
    return torch.cat(found)


def cut_attention(rank: int, world: int, starts: list[int]) -> list[Tensor]:
    """Output of this rank's tokens and gradients of its query, key and value."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, context=world))
    config: Any = SimpleNamespace(attention_dropout=0.0, softmax_scale=None)
    attention = layers.PackedAttention(config, 1, AttnMaskType.causal)
    lengths = torch.tensor(starts, dtype=torch.int32)
    own = zigzag.own_tokens(lengths, groups.context().rank(), world)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    layers.cut_over_context(params, own)
    q, k, v = (x[own].requires_grad_() for x in some_qkv(starts[-1]))
    out = attention(q, k, v, None, packed_seq_params=params)
    (out * torch.arange(starts[-1])[own, None]).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def test_attention_over_the_keys_of_all_ranks_is_plain_attention() -> None:
    starts = [0, 4, 16, 24]  # sequences of unequal length, so that rows are padded
    q, k, v = (x.requires_grad_() for x in some_qkv(starts[-1]))
    out = plain_attention(q, k, v, starts)
    (out * torch.arange(starts[-1])[:, None]).sum().backward()
    expected = [out.detach(), q.grad, k.grad, v.grad]
    for rank, found in enumerate(gloo.run(cut_attention, 2, starts)):
        own = zigzag.own_tokens(torch.tensor(starts), rank, 2)
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs is not None and torch.allclose(ours, theirs[own], rtol=1e-12, atol=1e-12)

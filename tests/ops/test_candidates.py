"""The candidates: what they hold, what they promise, and that the promise decides who takes the fallback."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.ops import VocabShard, candidates, policy_stats, sorting
from megatron_ext.ops.nucleus import exchange
from tests import gloo
from tests.ops.cases import ALL, assert_values, language_like

WIDE = 2 * candidates.SMALL + 5  # wide enough for block maxima, and no multiple of their stride


def candidates_of(logits: torch.Tensor, K: int, tail: float = 0.0) -> tuple[candidates.Candidates, torch.Tensor]:
    wide = logits.float()
    maxima = candidates.block_maxima(wide)
    top = maxima.amax(-1, keepdim=True)
    total = (wide - top).exp().sum(-1, keepdim=True)
    return candidates.make_candidates(logits, maxima, top, K, candidates.Mass(total, torch.ones_like(top), tail)), top


@pytest.mark.parametrize("V", [7, 300, candidates.SMALL, WIDE])
def test_block_maxima_cover_every_column(V):
    x = torch.randn(3, V)
    maxima = candidates.block_maxima(x)
    assert maxima.shape == (3, candidates.num_blocks(V))
    for column in (0, V // 2, V - 1):
        raised = x.clone()
        raised[:, column] = 99.0
        assert (candidates.block_maxima(raised).amax(-1) == 99).all()


@pytest.mark.parametrize("V", [7, 300, WIDE])
@pytest.mark.parametrize("tail", [0.0, 0.3])
def test_a_list_is_every_value_above_its_floor_in_descending_order(V, tail):
    logits, _ = language_like(4, V)
    found, _ = candidates_of(logits, 16, tail)
    for token in range(4):
        expected = logits[token][logits[token] > found.floor[token]].sort(descending=True).values
        assert torch.equal(found.entries[token, : len(expected)], expected)
        assert (found.entries[token, len(expected) :] == -torch.inf).all()
    assert (found.floor > -torch.inf).all() == (V > 16)


def test_candidates_end_where_the_tail_begins_and_hold_the_mass_above_it():
    logits, _ = language_like(16, WIDE)
    short, long = candidates_of(logits, 64, tail=0.1)[0], candidates_of(logits, 64)[0]
    probability = logits.softmax(-1)
    held = (probability * (logits > short.floor)).sum(-1)
    full = long.floor == short.floor
    assert (full[:, 0] | (held >= 0.9)).all()
    assert (short.floor >= long.floor).all()
    assert not full.all()
    assert ((short.entries > -torch.inf).sum(-1) <= (long.entries > -torch.inf).sum(-1)).all()


@pytest.mark.parametrize("V", [7, 300, WIDE])
def test_counts_hold_every_logit_above_their_floor(V):
    logits, _ = language_like(6, V, torch.bfloat16)
    logits[0, :3] = torch.tensor([0.0, -0.0, 0.0])
    found, top = candidates_of(logits, 16)
    value, count = found.unpack(top)
    for token in range(6):
        floor = found.floor[token]
        for v in logits[token].float().unique():
            if v > floor:
                assert count[token][value[token] == v] == (logits[token].float() == v).sum()
    assert (found.floor < top).all()


def test_a_count_that_does_not_fit_the_exchange_is_not_promised():
    top, highest_missing = torch.zeros(2, 1), torch.full((2, 1), -torch.inf)
    count = torch.tensor([[40_000, 0], [4, 0]], dtype=torch.int32)
    found = candidates.counted_candidates(count, highest_missing, top)
    assert found.floor[0] == torch.inf and -torch.inf < found.floor[1] < 0
    logits, targets = torch.zeros(1, 40_000, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    out = policy_stats(logits, targets, top_p=0.5, want=ALL)
    assert out["nucleus_size"] == 40_000 and out["num_fallback"] == 1


def test_order_keys_are_the_order_of_the_floats():
    x = torch.tensor([-torch.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.5, 3e38, torch.inf])
    for value in (x, x.double()):
        key = sorting.order_key(value)
        assert (key[1:] - key[:-1] > 0).tolist() == [True] * 4 + [False] + [True] * 4
        assert torch.equal(sorting.from_order_key(key, value.dtype), value)


def wide_logits(rank: int, world: int, dtype: torch.dtype, V: int) -> tuple[dict, int]:
    logits, targets = language_like(8, V, dtype)
    shard = VocabShard.for_vocab(V, torch.distributed.group.WORLD if world > 1 else None)
    local = torch.full((8, shard.width), 50.0, dtype=dtype)
    local[:, : shard.real] = logits[:, shard.start : shard.start + shard.real]
    out = policy_stats(local, targets, shard, top_p=0.8, want=ALL, grad=())
    return {name: out[name] for name in ALL}, int(out["num_fallback"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_a_full_vocabulary(world, dtype, record_property):
    V = 151_936
    ranks = gloo.run(wide_logits, world, dtype, V) if world > 1 else [wide_logits(0, 1, dtype, V)]
    logits, targets = language_like(8, V, dtype)
    for values, unresolved in ranks:
        assert_values(values, logits, targets, 1.0, 0.8, "inclusive")
        record_property("resolved_share", 1 - unresolved / 8)
        assert unresolved <= 1
        assert torch.equal(values["nucleus_entropy"], ranks[0][0]["nucleus_entropy"])


def count_collectives(rank: int, world: int, want: tuple[str, ...], V: int) -> list[tuple[str, int]]:
    """Names and bytes sent a token of every collective of one forward and backward."""
    seen: list[tuple[str, int]] = []
    originals = {name: getattr(torch.distributed, name) for name in ("all_gather_into_tensor", "all_to_all_single")}

    def counted(name):
        def call(output, value, group=None):
            seen.append((name, value.numel() * value.element_size() // 8))
            return originals[name](output, value, group=group)

        return call

    for name in originals:
        setattr(torch.distributed, name, counted(name))
    logits, targets = language_like(8, V)
    shard = VocabShard.for_vocab(V, torch.distributed.group.WORLD)
    local = logits[:, shard.start : shard.stop].clone().requires_grad_()
    out = policy_stats(local, targets, shard, top_p=0.5, want=want, grad=("logprob",))
    out["logprob"].sum().backward()
    return seen


def test_the_exchange_is_two_collectives_whatever_the_vocabulary_and_one_without_a_nucleus():
    plain = gloo.run(count_collectives, 2, ("logprob", "entropy"), 1024)[0]
    assert plain == [("all_gather_into_tensor", 16)]
    small, large = (gloo.run(count_collectives, 2, ALL, V)[0] for V in (1024, 65536))
    assert small == large == [("all_to_all_single", 20 + 4 * 256), ("all_gather_into_tensor", 32 // 2)]


def test_no_candidates_and_no_moment_unless_asked(monkeypatch):
    from megatron_ext.ops import logit_passes

    calls = []
    monkeypatch.setattr(logit_passes, "make_candidates", lambda *arguments: calls.append("candidates"))
    logits, targets = language_like(2, 50)
    policy_stats(logits, targets, want=("logprob", "entropy"), grad=())
    assert not calls
    sums, none = logit_passes.summarise(
        logits, targets[:, None], torch.ones(2, 1), 50, moment=False, num_candidates=None
    )
    assert none is None and not sums[:, 2].any()
    assert exchange(sums, torch.ones(2, 1), VocabShard.for_vocab(50)).nucleus is None

"""VocabShard.for_vocab is Megatron's equal split, and the default of the operators is the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.ops import VocabShard, policy_stats
from tests import gloo


def split(rank: int, world: int, vocab: int, padded_size: int | None) -> tuple[int, int, int]:
    shard = VocabShard.for_vocab(vocab, torch.distributed.group.WORLD, padded_size=padded_size)
    return shard.start, shard.stop, shard.real


@pytest.mark.parametrize(
    ("world", "vocab", "padded_size", "expected"),
    [
        (2, 10, None, [(0, 5, 5), (5, 10, 5)]),
        (2, 11, None, [(0, 6, 6), (6, 12, 5)]),
        (2, 11, 16, [(0, 8, 8), (8, 16, 3)]),
        (3, 4, 12, [(0, 4, 4), (4, 8, 0), (8, 12, 0)]),
    ],
)
def test_every_rank_holds_an_equal_part_and_padding_comes_last(world, vocab, padded_size, expected):
    assert gloo.run(split, world, vocab, padded_size) == expected


def test_one_rank_holds_everything():
    assert VocabShard.for_vocab(7) == VocabShard(0, 7, 7)
    logits, targets = torch.randn(3, 7), torch.tensor([0, 6, 3])
    out, same = policy_stats(logits, targets), policy_stats(logits, targets, VocabShard(0, 7, 7))
    assert torch.equal(out["logprob"], same["logprob"])


def test_a_padded_size_below_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="padded_size of at least 9, found 8"):
        VocabShard.for_vocab(9, padded_size=8)

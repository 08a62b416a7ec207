"""Bins under a token budget, and the rows that predict the response."""

from __future__ import annotations

import random

import pytest

from megatron_ext.train.packing import pack, split


def test_every_sequence_is_in_one_bin_and_no_bin_exceeds_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 40))]
        budget, least = draw.randint(50, 200), draw.randint(1, 5)
        bins = split(lengths, budget, least)
        assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
        assert all(bin == sorted(bin) and sum(lengths[i] for i in bin) <= budget for bin in bins)
        assert len(bins) >= max(least, -(-sum(lengths) // budget))


def test_bins_are_balanced() -> None:
    bins = split([10] * 8, 1000, 4)
    assert [len(bin) for bin in bins] == [2, 2, 2, 2]


def test_more_bins_than_sequences_leave_some_empty() -> None:
    assert sorted(map(len, split([3], 10, 3))) == [0, 0, 1]


def test_a_sequence_longer_than_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="10 cannot hold a sequence of 11"):
        split([3, 11], 10)


def test_rows_predict_the_response_tokens() -> None:
    packed = pack([((5, 6, 7), (8, 9)), ((1,), (2, 3, 4))], multiple=4)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4, 0, 0, 0]
    assert packed.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert packed.starts.tolist() == [0, 5, 9, 12]
    assert packed.logit_positions.tolist() == [2, 3, 5, 6, 7]
    assert packed.targets.tolist() == [8, 9, 2, 3, 4]
    assert packed.response_lengths == (2, 3)
    for row, target in zip(packed.logit_positions.tolist(), packed.targets.tolist(), strict=True):
        assert packed.tokens[row + 1] == target


def test_an_empty_bin_still_has_tokens_for_the_pipeline() -> None:
    packed = pack([], multiple=1)
    assert len(packed.tokens) == 1 and len(packed.logit_positions) == 0

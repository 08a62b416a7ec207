"""Bins under a token budget, prompts that several responses share, and the positions that predict the response."""

from __future__ import annotations

import random

import pytest

from megatron_ext.train.packing import MiniBatch, Pair, neighbours, pack, split

WIDTH = 1000  # at which sharing pays


def of_lengths(*lengths: int) -> list[Pair]:
    """Sequences of which the model reads so many tokens, each with a prompt of its own."""
    return [((number,), range(length)) for number, length in enumerate(lengths)]


def test_every_sequence_is_in_one_bin_and_no_bin_exceeds_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 40))]
        budget, least = draw.randint(50, 200), draw.randint(1, 5)
        bins = split(of_lengths(*lengths), budget, least)
        assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
        assert all(bin == sorted(bin) and sum(lengths[i] for i in bin) <= budget for bin in bins)
        assert len(bins) >= max(least, -(-sum(lengths) // budget))


def test_bins_are_balanced() -> None:
    bins = split(of_lengths(*[10] * 8), 1000, 4)
    assert [len(bin) for bin in bins] == [2, 2, 2, 2]


def test_bins_are_balanced_by_what_their_sequences_cost() -> None:
    """By tokens 6 stands against 3 + 3; squared, 36 against 18, and both of the next 2 go to the latter."""
    pairs = of_lengths(6, 3, 3, 2, 2)
    assert split(pairs, 100, 2) == [[0, 3], [1, 2, 4]]
    assert split(pairs, 100, 2, cost=lambda tokens: tokens**2) == [[0], [1, 2, 3, 4]]
    assert split(pairs, 9, 2, cost=lambda tokens: tokens**2) == [[0, 4], [1, 2, 3]]  # the cheaper one has no room


def test_more_bins_than_sequences_leave_some_empty() -> None:
    assert sorted(map(len, split(of_lengths(3), 10, 3))) == [0, 0, 1]


def test_neighbours_that_fit_together_are_one() -> None:
    assert neighbours([4, 6, 7, 2, 2, 20, 1], 10) == [range(2), range(2, 4), range(4, 5), range(5, 6), range(6, 7)]
    assert neighbours([3, 7], 10) == [range(2)] and neighbours([3, 8], 10) == [range(1), range(1, 2)]


def test_a_sequence_longer_than_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="10 cannot hold a sequence of 11"):
        split(of_lengths(3, 11), 10)


def test_logit_positions_predict_the_response_tokens() -> None:
    packed = pack([((5, 6, 7), (8, 9)), ((1,), (2, 3, 4))], multiple=4)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 1, 2, 3, 0]  # without each response's last token
    assert packed.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert packed.starts.tolist() == [0, 4, 7, 8]
    assert packed.logit_positions.tolist() == [2, 3, 4, 5, 6]
    assert packed.targets.tolist() == [8, 9, 2, 3, 4]
    assert packed.response_lengths == (2, 3) and packed.branch is None


def test_a_prompt_stands_once_before_the_responses_that_share_it() -> None:
    pairs = [((5, 6), (7, 8, 9)), ((5, 6), (1,)), ((5, 6), (2, 3)), ((5,), (4, 4)), ((5, 6), ())]
    packed = pack(pairs, multiple=5, width=WIDTH)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 2, 5, 4, 5, 6, 0]
    assert packed.position.tolist() == [0, 1, 2, 3, 2, 0, 1, 0, 1, 0]
    assert packed.branch is not None and packed.branch.tolist() == [0, 0, 1, 1, 3, 0, 1, 0, 0, 0]
    assert packed.starts.tolist() == [0, 5, 7, 9, 10]
    assert packed.logit_positions.tolist() == [1, 2, 3, 1, 1, 4, 5, 6]
    assert packed.targets.tolist() == [7, 8, 9, 1, 2, 3, 4, 4]
    assert packed.response_lengths == (3, 1, 2, 2, 0)


def test_responses_stay_with_their_prompt_as_far_as_bins_and_their_number_allow() -> None:
    group = [((1, 2, 3, 4), (5, 6, 7))] * 4  # 6 tokens alone, 12 together
    assert split(group * 2, 12, 2, width=WIDTH) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split(group * 2, 16, 1, width=WIDTH) == [[0, 1, 2, 3, 4, 5], [6, 7]]  # neighbours with equal prompts
    assert sorted(map(len, split(group, 12, 3, width=WIDTH))) == [1, 1, 2]  # one tree for three bins: nothing shared
    assert len(pack(group, width=WIDTH).tokens) == 12 and len(pack(group).tokens) == 24


@pytest.mark.parametrize(("prompt", "response", "together"), [(11, 8, 8), (11, 200, 1), (1000, 200, 8)])
def test_a_prompt_is_shared_where_it_costs_more_than_the_attention_it_wastes(
    prompt: int, response: int, together: int
) -> None:
    group: list[Pair] = [((1,) * prompt, (2,) * (response + 1))] * 8
    packed = pack(group, width=384)
    assert packed.starts.diff().tolist() == [prompt + response * together] * (8 // together)


def test_trees_are_the_same_in_a_micro_batch_as_in_the_mini_batch() -> None:
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(9) for _ in range(draw.randint(1, 6))) for _ in range(6)]
    pairs = [(prompt, tuple(draw.randrange(9) for _ in range(draw.randint(0, 9)))) for prompt in prompts * 2]
    pairs = sorted(pairs, key=lambda pair: pair[0])
    for budget in (20, 40, 80):
        bins = split(pairs, budget, width=WIDTH)
        packed = MiniBatch.pack(pairs, bins, width=WIDTH)
        assert all(len(each.tokens) <= budget for each in packed.micro_batches)
        joined = packed.join([each.targets for each in packed.micro_batches])
        assert joined.tolist() == [token for _, response in pairs for token in response]


def test_an_empty_bin_still_has_tokens_for_the_pipeline() -> None:
    packed = pack([], multiple=1)
    assert len(packed.tokens) == 1 and len(packed.logit_positions) == 0

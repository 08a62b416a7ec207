"""Aggregations by hand, and the same over two ranks as over one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.train.token_weights import token_weights

# Three responses of 2, 4 and 2 tokens; the last one does not train, nor does one token of the second.
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
MASK = torch.tensor([True, True, True, False, True, True, False, False])
COUNTS: dict[str, Any] = {"num_sequences": 2, "num_tokens": 5, "max_response_tokens": 10}
EXPECTED = {
    "token-mean": [1 / 5, 1 / 5, 1 / 5, 0, 1 / 5, 1 / 5, 0, 0],
    "seq-mean-token-mean": [1 / 4, 1 / 4, 1 / 6, 0, 1 / 6, 1 / 6, 0, 0],
    "seq-mean-token-sum": [1 / 2, 1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 0],
    "seq-mean-token-sum-norm": [1 / 20, 1 / 20, 1 / 20, 0, 1 / 20, 1 / 20, 0, 0],
}


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_weights_by_hand(aggregation: Any) -> None:
    weight = token_weights(aggregation, SEQUENCE, MASK, **COUNTS)
    assert weight.tolist() == pytest.approx(EXPECTED[aggregation])
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_ranks_weigh_their_part_as_one_rank_weighs_the_whole(aggregation: Any) -> None:
    first = token_weights(aggregation, SEQUENCE[:2], MASK[:2], **COUNTS)
    second = token_weights(aggregation, SEQUENCE[2:] - 1, MASK[2:], **COUNTS)
    assert torch.equal(torch.cat([first, second]), token_weights(aggregation, SEQUENCE, MASK, **COUNTS))


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_nothing_to_train_on_weighs_nothing(aggregation: Any) -> None:
    counts = COUNTS | {"num_sequences": 0, "num_tokens": 0}
    assert not token_weights(aggregation, SEQUENCE, torch.zeros_like(MASK), **counts).any()

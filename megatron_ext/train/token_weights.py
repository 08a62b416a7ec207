"""Aggregation as one weight per token, fixed from counts over the whole mini-batch.

The loss of a mini-batch is ``sum_t weight_t * loss_t`` over all its tokens, micro-batches and data-parallel
ranks, so no split of it changes the result. With N tokens, B sequences, |o| valid tokens of a sequence:

    token-mean               1 / N
    seq-mean-token-mean      1 / (B |o|)
    seq-mean-token-sum       1 / B
    seq-mean-token-sum-norm  1 / (B C),  C = max_response_tokens   (Dr.GRPO)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation


def token_weights(
    aggregation: Aggregation,
    sequence: Tensor,
    mask: Tensor,
    *,
    num_sequences: int,
    num_tokens: int,
    max_response_tokens: int,
) -> Tensor:
    """``[T]`` fp32 weights, 0 where ``mask`` is False.

    ``sequence [T]`` numbers this rank's sequences; the two counts are over all ranks.
    """
    if aggregation == "token-mean":
        weight = torch.full_like(sequence, 1, dtype=torch.float32) / max(num_tokens, 1)
    else:
        divisor = torch.ones_like(sequence, dtype=torch.float32)
        if aggregation == "seq-mean-token-mean":
            divisor = torch.bincount(sequence[mask], minlength=int(sequence.max()) + 1)[sequence].clamp(min=1).float()
        elif aggregation == "seq-mean-token-sum-norm":
            divisor = divisor * max_response_tokens
        weight = 1 / (divisor * max(num_sequences, 1))
    return torch.where(mask, weight, 0.0)

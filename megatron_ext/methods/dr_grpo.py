"""Dr.GRPO: GRPO without its two normalisations (arXiv 2503.20783; eq. 4 of SIREN, arXiv 2509.25133).

GRPO divides by a response's length, which makes long wrong answers cheap per token, and by the group's standard
deviation, which favours problems that are nearly always or nearly never solved. Dr.GRPO leaves both divisions out.

    A_i = R_i - mean(R of the group)
    L   = mean_i (1/C) sum_t max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),  C = max_response_tokens

The mean is over the sequences of the mini-batch, as in verl 0.9.1's mode of the same name (older copies of it add up
responses). The clip range .2 / .28 is SIREN's.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.methods.base import Aggregation
from megatron_ext.methods.grpo import GRPO


@dataclass(kw_only=True)
class DrGRPO(GRPO):
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    normalise: bool = False
    clip_high: float = 0.28

"""NSR, PSR and W-REINFORCE: learning from wrong, from correct, or from weighted responses (arXiv 2506.01347).

Rewarding correct responses concentrates the policy on few of them, and it solves fewer problems in many tries.
Punishing wrong ones moves probability to the other answers it holds plausible: NSR does only that, W-REINFORCE mostly.

    A_i = positive  if R_i > 0 (correct)        L = (1/N_kept) sum_{t kept} max(-A r, -A clip(r, 1 -+ .2))
         -negative  otherwise (wrong)           kept: tokens of responses with A_i != 0

    W-REINFORCE  positive .1, negative 1        PSR  positive 1, negative 0        NSR  positive 0, negative 1

No baseline and no standard deviation: a group of one, or of equal rewards, trains too (``normalise`` has nothing to do
here). Dropped responses leave the denominator, whatever the ``aggregation``: N_kept, or the number of responses kept,
is counted over the whole mini-batch on all ranks, so there is no smaller scope to offer.

Differs from the authors' code, which takes the responses that NSR or PSR drop out of the step before it is cut into
mini-batches, and so has fewer updates; here each update has its own mini-batch without them. Its scripts carry an
entropy bonus of .001 that the paper does not mention: not mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation, Prepared, Reducer, kept_weights, num_selected, sequence_lengths
from megatron_ext.methods.grpo import GRPO
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class WReinforce(GRPO):
    aggregation: Aggregation = "token-mean"
    positive: float = 0.1
    negative: float = 1.0
    group_relative: ClassVar[bool] = False
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="reinforce/kept_share", section="Learning", title="Kept tokens", unit="share of tokens",
            meaning="tokens of the responses that train",
            good="far from 0",
            low="almost all responses are of the kind that is left out"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positive", "negative"):
            self.check(name, getattr(self, name) >= 0, "a number of at least 0")
        self.check("negative", self.positive + self.negative > 0, "a number above 0, since positive is 0")

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        advantage = torch.where(reward_B > 0, self.positive, -self.negative)
        return torch.where(reward_B.isnan(), 0.0, advantage)

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        kept = batch.mask & (batch.advantage != 0)
        count = num_selected(kept, reduce)
        responses = num_selected(sequence_lengths(batch.sequence, kept, len(batch.reward)) > 0, reduce)
        weight = kept_weights(self.aggregation, batch, kept, num_tokens=count, num_sequences=responses)
        return Prepared({"weight": weight}, {"reinforce/kept_share": count / max(batch.num_tokens, 1)})


@dataclass(kw_only=True)
class PSR(WReinforce):
    positive: float = 1.0
    negative: float = 0.0


@dataclass(kw_only=True)
class NSR(WReinforce):
    positive: float = 0.0
    negative: float = 1.0

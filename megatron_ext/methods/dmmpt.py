"""DMMPT: dynamic masking of well-mastered positive tokens (UloRL, arXiv 2507.19766).

Correct responses consist largely of tokens that the policy already predicts with near certainty; training on them
again only lowers entropy. DMMPT leaves these tokens out where entropy is low, and trains on everything else.

    mastered_t = R_i is correct  and  pi(o_t) >= tau  and  H(o_i) < sigma
    L          = (1/N) sum_{t not mastered} max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

N counts all tokens, the masked ones too. pi and H are the current policy's, constants of the mask; H(o_i) is the
mean entropy of the token's own response (``switch = "response"``), or of the whole batch, which then masks in all
responses or in none (``switch = "batch"``).

Scope. A response is never split, so its mean needs none. The batch mean is over the whole mini-batch on all ranks;
``scope = "micro_batch"``: over each micro-batch. The authors' repository (liushulinle/ULORL) holds no code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import Aggregation, Needs, Prepared, Reducer, sequence_lengths, token_mean
from megatron_ext.methods.selection import Selective
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class DMMPT(Selective):
    aggregation: Aggregation = "token-mean"
    tau: float = 0.99
    sigma: float = 0.2  # nats
    switch: Literal["response", "batch"] = "response"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="dmmpt/mastered", section="Entropy", title="Selected tokens", unit="share of tokens",
            meaning="well-mastered positive tokens, which are masked"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("tau", 0 < self.tau <= 1, "a probability above 0 and at most 1")
        self.check("sigma", self.sigma > 0, "an entropy above 0, in nats")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        assert stats.entropy is not None
        if self.switch == "batch":
            low = torch.full_like(batch.mask, token_mean(stats.entropy, batch.mask, reduce) < self.sigma)
        else:
            total = torch.zeros_like(batch.reward, dtype=stats.entropy.dtype)
            total = total.index_add(0, batch.sequence, torch.where(batch.mask, stats.entropy, 0.0))
            count = sequence_lengths(batch.sequence, batch.mask, len(batch.reward)).clamp(min=1)
            low = batch.token(total / count < self.sigma)
        correct = batch.token(batch.reward > 0)
        return Prepared({"mastered": batch.mask & correct & low & (stats.logprob.exp() >= self.tau)})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"mastered": self.chosen(batch, stats, reduce, "mastered")}

    def policy_loss(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        return torch.where(prepared.token["mastered"], 0.0, super().policy_loss(batch, stats, prepared))

    def metrics(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> dict[str, Tensor]:
        mastered = self.complete(batch, stats, prepared).token["mastered"]
        return super().metrics(batch, stats, prepared) | {"dmmpt/mastered": mastered.sum()}

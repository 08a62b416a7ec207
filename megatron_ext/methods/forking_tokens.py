"""Forking tokens, the 80/20 rule: learn from high-entropy tokens only (arXiv 2506.01939; "w/ Mask" elsewhere).

Most tokens of a response only complete what has been begun; a few of high entropy decide where the reasoning goes.
Updates on the many others add little, so only these forking tokens are trained.

    S = the rho N tokens of highest entropy,  N = all tokens
    L = (1/|S|) sum_{t in S} max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

The sum is divided by the number of tokens kept, and S is a constant. H_t is the full-vocabulary entropy of the
current policy. On top of DAPO, as in the paper: clip .2 / .28, overlong shaping as an option.

Scope. S is chosen from the whole mini-batch over all ranks, ties by the token's key (selection.py).

Differs from the authors' code, which takes the quantile of each micro-batch on each rank and averages over the
tokens kept there: ``scope = "micro_batch"``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared, Reducer, num_selected
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.selection import Selective, count_of, token_keys, top_k
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class ForkingTokens(ClipHigher, Selective):
    rho: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rho", 0 < self.rho <= 1, "a share of the tokens above 0 and at most 1")
        self.check("aggregation", self.aggregation == "token-mean", "'token-mean': the mean is over the tokens kept")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        assert stats.entropy is not None
        count = count_of(self.rho, num_selected(batch.mask, reduce))
        selected = top_k(stats.entropy, batch.mask, count, token_keys(batch), reduce)
        return Prepared({"weight": selected * (self.share(batch) / count)})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"forking": self.chosen(batch, stats, reduce, "weight")}

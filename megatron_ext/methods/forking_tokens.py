"""Forking tokens, the 80/20 rule: learn from high-entropy tokens only (arXiv 2506.01939; "w/ Mask" elsewhere).

Most tokens of a response only complete what has been begun; a few of high entropy decide where the reasoning goes.
Updates on the many others add little, so only these forking tokens are trained.

    S = the rho N tokens of highest entropy,  N = all tokens
    L = (1/|S|) sum_{t in S} max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

The sum is divided by the number of tokens kept, as in SENT (arXiv 2512.04359, appendix C.4), and S is a constant. The
paper's first version divides by all N, which makes the gradient 1 / rho times smaller: ``denominator = "all"``. H_t is
the full-vocabulary entropy of the current policy. On top of DAPO, as in the paper: clip .2 / .28, overlong shaping as
an option. Another ``aggregation`` is taken over the tokens kept too: ``seq-mean-token-mean`` is each response's mean
over its own, the others' divisors are no counts of tokens.

SENT repeats DAPO's condition that a group's answers are neither all right nor all
wrong: that is ``rollout.dynamic_sampling``. Such a group has no advantage, but its tokens are counted in N and S.

Scope. S is chosen from the whole mini-batch over all ranks, ties by the token's key (selection.py). SIREN's 80/20
(arXiv 2509.25133, its code) chooses within each response: ``quantile = "response"`` keeps a response's tokens
whose entropy is above its (1 - rho)-quantile (linear interpolation).

SENT takes the quantile of each micro-batch, and averages over the tokens kept there: ``scope = "micro_batch"``. The
authors' code is not public.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared, Reducer, kept_weights, num_selected, quantile_by_sequence
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.selection import Selective, count_of, token_keys, top_k
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class ForkingTokens(ClipHigher, Selective):
    rho: float = 0.2
    quantile: Literal["batch", "response"] = "batch"
    denominator: Literal["kept", "all"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rho", 0 < self.rho <= 1, "a share of the tokens above 0 and at most 1")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        assert stats.entropy is not None
        kept = self.forking(batch, stats.entropy, reduce)
        if self.denominator == "all":
            return Prepared({"weight": kept * batch.weight})
        count = num_selected(kept, reduce) / (self.share(batch) or 1.0)
        weight = kept_weights(self.aggregation, batch, kept, num_tokens=count, num_sequences=batch.num_sequences)
        return Prepared({"weight": weight})

    def forking(self, batch: Batch, entropy: Tensor, reduce: Reducer) -> Tensor:
        """S, ``[T]`` bool."""
        if self.quantile == "batch":
            count = count_of(self.rho, num_selected(batch.mask, reduce))
            return top_k(entropy, batch.mask, count, token_keys(batch), reduce)
        threshold = quantile_by_sequence(entropy, batch.sequence, batch.mask, 1 - self.rho, len(batch.reward))
        return batch.mask & (entropy > batch.token(threshold))

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        assert stats.entropy is not None
        return {"forking": self.forking(batch, stats.entropy, reduce)}

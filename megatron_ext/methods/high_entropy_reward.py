"""An entropy bonus on high-entropy tokens only ("w/ High_En", a baseline of SENT, arXiv 2512.04359).

A bonus on every token also makes tokens uncertain that should be certain, such as grammar and arithmetic. This one
rewards entropy only where the policy is undecided already.

    S = the rho N tokens of highest entropy,  N = all tokens
    L = L_GRPO - coef * (1/|S|) sum_{t in S} H_t

H_t is the full-vocabulary entropy of the current policy, with gradient; S is a constant. Appendix C.7 of the paper
writes a sum over S where a mean stands here. Over a group of 8 responses of 2048 tokens the sum is 3,276 times the
mean; the coefficient of .001, which the paper shares with the token-mean bonus of C.2, is taken to be a mean's.

Scope. S is chosen from the whole mini-batch over all ranks, ties by the token's key (selection.py).
``scope = "micro_batch"`` chooses from and averages over each micro-batch, as verl-based codes do. In SENT's code it was
not found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared, Reducer, num_selected
from megatron_ext.methods.selection import Selective, count_of, token_keys, top_k
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class HighEntropyReward(Selective):
    coef: float = 0.001
    rho: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("coef", self.coef >= 0, "a number of at least 0")
        self.check("rho", 0 < self.rho <= 1, "a share of the tokens above 0 and at most 1")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True, entropy_grad=True)

    def select(self, batch: Batch, stats: TokenStats, prepared: Prepared, reduce: Reducer) -> Prepared:
        assert stats.entropy is not None
        count = count_of(self.rho, num_selected(batch.mask, reduce))
        selected = top_k(stats.entropy, batch.mask, count, token_keys(batch), reduce)
        return Prepared({"bonus": selected * (self.coef * self.share(batch) / count)})

    def selections(self, batch: Batch, stats: TokenStats, reduce: Reducer) -> dict[str, Tensor]:
        return {"high entropy": self.chosen(batch, stats, reduce, "bonus")}

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        assert stats.entropy is not None
        return -prepared.token["bonus"] * stats.entropy

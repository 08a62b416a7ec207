"""The naive entropy bonus ("w/ En" and "naive" in the papers' comparisons; eq. 2 of SIREN, arXiv 2509.25133).

Reinforcement learning lowers the policy's entropy until it samples the same answers again and again. The bonus rewards
entropy itself, on every token and with one constant coefficient.

    L = L_GRPO - coef * agg_t(H_t)

with ``agg`` the aggregation of the policy loss and H_t the full-vocabulary entropy of the current policy, with
gradient. The coefficient is hard to choose: .001 hardly matters in SIREN's setting and .005 explodes by step 40.
SIREN compares on Dr.GRPO: ``aggregation = "seq-mean-token-sum-norm"``, ``normalise = false``, ``clip_high = .28``.

There is no statistic. The authors' codes average each micro-batch over its own tokens, which weighs the tokens of
a short micro-batch more; here the weights are those of the mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared
from megatron_ext.methods.grpo import GRPO
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class EntropyBonus(GRPO):
    coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("coef", self.coef >= 0, "a number of at least 0")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True, entropy_grad=True)

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        assert stats.entropy is not None
        return -self.coef * self.weight(batch, prepared) * stats.entropy

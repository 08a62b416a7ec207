"""The naive entropy bonus ("w/ En" and "naive" in the papers' comparisons; eq. 2 of SIREN, arXiv 2509.25133).

Reinforcement learning lowers the policy's entropy until it samples the same answers again and again. The bonus rewards
entropy itself, on every token and with one constant coefficient.

    L = L_GRPO - coef * agg_t(H_t)

with ``agg`` the aggregation of the policy loss (``entropy_aggregation = "policy"``, SIREN's) or the mean over all
tokens (``"token-mean"``, beside a policy loss that is a mean over responses: appendix C.2 of SENT, arXiv 2512.04359),
and H_t the full-vocabulary entropy of the current policy, with gradient. The coefficient is hard to choose: in SIREN's
setting entropy does not explode at .001, and does by step 40 at .005.
SIREN compares on Dr.GRPO: ``aggregation = "seq-mean-token-sum-norm"``, ``normalise = false``, ``clip_high = .28``.

There is no statistic. The authors' codes average each micro-batch over its own tokens, which weighs the tokens of
a short micro-batch more; here the weights are those of the mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_ext.methods.base import Needs, Prepared
from megatron_ext.methods.grpo import GRPO
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class EntropyBonus(GRPO):
    coef: float = 0.001
    entropy_aggregation: Literal["policy", "token-mean"] = "policy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("coef", self.coef >= 0, "a number of at least 0")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, entropy=True, entropy_grad=True)

    def regulariser(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        assert stats.entropy is not None
        if self.entropy_aggregation == "token-mean":
            return -self.coef / max(batch.num_tokens, 1) * batch.mask * stats.entropy
        return -self.coef * self.weight(batch, prepared) * stats.entropy

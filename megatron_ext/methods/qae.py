"""QAE: the advantage over the group's K-quantile (arXiv 2509.22611, section 4).

With the mean as baseline few right answers turn all others of a group into mistakes, and punishing them all makes
entropy explode. With a quantile only the rare side of a group learns: its successes where the problem is hard, its
failures where it is easy.

    b_K = inf {x: F(x) >= K},  F the distribution of the group's rewards         eq. 3; 0 < K < 1
    A_i = (R_i - b_K) / (std + 1e-6)                                              std with ddof 1

With rewards of 0 and 1, b_K is 0 in a group of accuracy p <= 1 - K and 1 in an easier one (eq. 4), so most responses
have no advantage (80 % in the paper; ``advantage/zero``). K .4; .6 where entropy still collapses. The rest is DAPO's,
the paper's base: clip range .2 / .28, token-mean, overlong shaping (clip_higher.py); dynamic sampling is
``rollout.dynamic_sampling``. The only statistics are those of the groups, which are never split.

Differs from the authors' code, whose quantile lies between two rewards where K (G - 1) is no whole number:
``interpolate = true``. There a group in which K falls between its failures and its successes has a baseline between
0 and 1, and both sides learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.methods.base import group_statistics
from megatron_ext.methods.clip_higher import ClipHigher


@dataclass(kw_only=True)
class QAE(ClipHigher):
    k: float = 0.4
    interpolate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("k", 0 < self.k < 1, "a quantile above 0 and below 1")

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        advantage = reward_B - self.baseline(reward_B, group_B)
        if self.normalise:
            _, std, _ = group_statistics(reward_B, group_B)
            advantage = advantage / (std + 1e-6)
        return torch.where(reward_B.isnan(), 0.0, advantage)

    def baseline(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        """b_K of each sequence's group, ``[B]``; NaN rewards are left out."""
        _, group_B = torch.unique(group_B, return_inverse=True)
        by_reward = reward_B.argsort(stable=True)  # NaN last
        order = by_reward[group_B[by_reward].argsort(stable=True)]  # sorted within each group
        size = torch.bincount(group_B)
        start = size.cumsum(0) - size
        count = torch.bincount(group_B[~reward_B.isnan()], minlength=len(size))
        first = (self.k * count.double() - 1e-9).ceil() - 1  # K G is whole where only rounding says that it is not
        position = (self.k * (count - 1).double() if self.interpolate else first).clamp(min=0)
        low = position.floor().long()
        high = (low + 1).minimum((count - 1).clamp(min=0))
        reward = reward_B.nan_to_num().double()[order]
        baseline = torch.lerp(reward[start + low], reward[start + high], position - low)
        return baseline[group_B].to(reward_B.dtype)

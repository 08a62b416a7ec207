"""Controllers of the entropy: what the pages of several of them share.

A clip range whose upper bound moves while the policy trains, and a target that is the entropy of the first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_ext.methods import surrogates
from megatron_ext.methods.base import Needs
from megatron_ext.methods.grpo import GRPO
from megatron_ext.methods.targets import Schedule, Targeted


@dataclass(kw_only=True)
class MovingClip(GRPO):
    """GRPO on [1 - clip_low, 1 + high]: ``high`` begins as ``clip_high``, and a controller moves it.

    Named last among a method's bases, so that the others' defaults hold.
    """

    high: float = field(default=0.0, init=False)  # in force

    def __post_init__(self) -> None:
        super().__post_init__()
        self.high = self.clip_high

    @property
    def is_surrogate(self) -> bool:
        return True

    @property
    def ppo_surrogate(self) -> surrogates.PPO:
        return replace(super().ppo_surrogate, clip_high=self.high)


@dataclass(kw_only=True)
class KeepsEntropy(Targeted):
    """Measures the entropy of every step; holds that of the first one unless ``target`` says otherwise."""

    @property
    def own_target(self) -> Schedule:
        return Schedule(kind="constant", start=1.0, relative=True)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, old=True, entropy=True)

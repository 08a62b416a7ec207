"""Entrocraft: reject the responses that push entropy the wrong way (arXiv 2604.26326, algorithm 1).

Learning from right responses lowers entropy and learning from wrong ones raises it, and a term in the loss corrects
that late and unevenly. Entrocraft leaves the responses of one sign out of the update while entropy is outside a range,
and lets the range sink while training goes on.

    m   = [H > h_hi] - [H < h_lo]
    S_x = {i: m A_i >= 0}                       of the G responses to problem x; those without advantage stay
    J   = mean_x (1/|S_x|) sum_{i in S_x} ...   eq. 5: the policy loss with 1/|S_x| for 1/G
    h_lo, h_hi: linear from (h_low, h_high) to (h_low_end, h_high_end) in ``anneal_steps`` steps, then constant

H is the mean over the step's responses of a response's mean entropy per token (section 2.2), under the policy that
sampled them, over all ranks; m is set once a step, before its first update. The range of step s (from 1) has gone
s / anneal_steps of its way; s is in the checkpoint. The factor G / |S_x| is on the weight of every aggregation.

The defaults are the authors' main script, (.6, .7) -> (.4, .5) in one pass over 100k problems, 1024 a step; the paper
names the range of its long runs only, which ends at (.1, .2). Its aggregation is verl's default, token-mean (eq. 1 adds
up a response's tokens: ``seq-mean-token-sum``); its runs set ``beta = .001``.

Differs from the authors' code, which rejects nothing: ``variant = "authors"``. There A is max(R, 0) while m = 1 and
min(R, 0) while m = -1, the reward itself in the place of the group-relative advantage, so rewards are +-1
(``reward.wrong = -1.0``). All tokens stay in the denominator, and H is the mean over tokens. Their script of another
shape of the range, a cosine, is not mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_ext.methods.base import (
    Aggregation,
    Controller,
    Needs,
    Prepared,
    Reducer,
    group_statistics,
    num_selected,
    sequence_lengths,
    token_mean,
)
from megatron_ext.methods.grpo import GRPO
from megatron_ext.metric import Metric
from megatron_ext.types import Batch, TokenStats


@dataclass(kw_only=True)
class Entrocraft(GRPO):
    aggregation: Aggregation = "token-mean"
    h_low: float = 0.6  # nats
    h_high: float = 0.7
    h_low_end: float = 0.4
    h_high_end: float = 0.5
    anneal_steps: int = 97
    variant: Literal["paper", "authors"] = "paper"
    metrics_glossary: ClassVar[tuple[Metric, ...]] = (
        Metric(name="entrocraft/entropy", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="H: the entropy that is compared with the range", good="near entrocraft/target"),
        Metric(name="entrocraft/target", section="Entropy", title="Controlled entropy", unit="nats per token",
            meaning="the middle of the range in this step"),
        Metric(name="entrocraft/direction", section="Entropy", title="Coefficient", unit="sign",
            meaning="m: 1 where entropy is above the range and wrong responses are left out, -1 where it is below and "
            "right ones are, 0 within",
            low="at -1 for many steps there are too few wrong responses to raise entropy: lower the range",
            high="at 1 for many steps there are too few right responses to lower entropy: raise the range"),
        Metric(name="entrocraft/kept_share", section="Learning", title="Kept responses", unit="share of responses",
            meaning="responses that are not left out, mean over updates", good="1 within the range, above 0 outside"),
    )  # fmt: skip
    step: int = field(default=0, init=False)
    direction: int = field(default=0, init=False)  # m

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("h_low", self.h_low >= 0, "an entropy of at least 0, in nats")
        self.check("h_low_end", self.h_low_end >= 0, "an entropy of at least 0, in nats")
        self.check("h_high", self.h_low <= self.h_high, f"at least h_low = {self.h_low}")
        self.check("h_high_end", self.h_low_end <= self.h_high_end, f"at least h_low_end = {self.h_low_end}")
        self.check("anneal_steps", self.anneal_steps >= 1, "a number of steps of at least 1")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, old=True, entropy=True)

    @property
    def trains_on_wrong_rewards(self) -> bool:
        return self.variant == "authors"

    @property
    def controller(self) -> Controller:
        return Controller(
            measured="entrocraft/entropy", target="entrocraft/target", output="entrocraft/direction", bound=1.0
        )

    def bounds(self) -> tuple[float, float]:
        """The range of the present step."""
        gone = min(self.step / self.anneal_steps, 1.0)
        low = self.h_low + (self.h_low_end - self.h_low) * gone
        return low, self.h_high + (self.h_high_end - self.h_high) * gone

    def on_step_start(self, batch: Batch, stats: TokenStats | None, reduce: Reducer) -> dict[str, float]:
        assert stats is not None and stats.entropy is not None
        if self.variant == "authors":
            entropy = token_mean(stats.entropy, batch.mask, reduce)
        else:
            length = sequence_lengths(batch.sequence, batch.mask, len(batch.reward)).clamp(min=1)
            value = torch.where(batch.mask, stats.entropy, 0.0).double() / batch.token(length)
            entropy = float(reduce.sum(value.sum())) / max(batch.num_sequences, 1)
        return {"entrocraft/entropy": entropy} | self.advance(entropy)

    def advance(self, entropy: float) -> dict[str, float]:
        """One step of the controller, as it is reported."""
        self.step += 1
        low, high = self.bounds()
        self.direction = int(entropy > high) - int(entropy < low)
        return {"entrocraft/target": (low + high) / 2, "entrocraft/direction": float(self.direction)}

    def prepare(self, batch: Batch, current: TokenStats | None, reduce: Reducer) -> Prepared:
        kept = batch.mask & (self.direction * self.advantage_of(batch) >= 0)
        kept_B = sequence_lengths(batch.sequence, kept, len(batch.reward)) > 0
        report = {"entrocraft/kept_share": num_selected(kept_B, reduce) / max(batch.num_sequences, 1)}
        if self.direction == 0 or self.variant == "authors":
            return Prepared({}, report)
        trains_B = sequence_lengths(batch.sequence, batch.mask, len(batch.reward)) > 0
        share_B, _, _ = group_statistics(torch.where(trains_B, kept_B.to(batch.reward.dtype), torch.nan), batch.group)
        factor = batch.token(torch.where(share_B > 0, 1 / share_B, 0.0))  # G / |S_x|
        return Prepared({"weight": kept * batch.weight * factor}, report)

    def advantage_of(self, batch: Batch) -> Tensor:
        """A of each token, ``[T]``, before any of it is left out."""
        if self.direction == 0 or self.variant == "paper":
            return batch.advantage
        return batch.token(batch.reward.nan_to_num())

    def advantage(self, batch: Batch, stats: TokenStats, prepared: Prepared) -> Tensor:
        advantage = self.advantage_of(batch)
        if self.direction == 0 or self.variant == "paper":
            return advantage
        return torch.where(self.direction * advantage >= 0, advantage, 0.0)

"""Alarms: what a step's metrics say when training is going wrong, told once each time it begins.

    entropy_low      entropy/full below entropy_floor x that of the first step (collapse)
    entropy_high     entropy/full above entropy_ceiling x that of the first step (explosion)
    not_finite       a loss, gradient, entropy, log-prob or reward of the step is NaN or infinite
    zero_advantage   more than zero_advantage_share of the responses have no advantage: nothing to learn from

An alarm begins in the first step its condition holds and ends in the first it does not. The metrics get
``alarm/<name>``, 1 while it lasts, and ``alarm/begun``, how many have begun since the run's first step. What an
alarm compares with, and which ones last, is state of the run and is checkpointed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.schema import AlarmsConfig
from megatron_ext.metrics.glossary import FINITE, GLOSSARY

ENTROPY, ZERO_ADVANTAGE, SKIPPED = "entropy/full", "advantage/zero", "grad/skipped"
NAMES = ("entropy_low", "entropy_high", "not_finite", "zero_advantage")


class AlarmError(RuntimeError):
    """Training was stopped by an alarm (alarms.stop) with its state saved. Exit code 3."""


@dataclass
class Alarms:
    """The alarms of a run. Every rank sees the same metrics, so every rank keeps the same state."""

    config: AlarmsConfig
    first_entropy: float | None = None  # nats, of the first step
    lasting: tuple[str, ...] = ()
    num_begun: int = 0

    def check(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """The alarms' own metrics of a step, and a line for each alarm that begins with it."""
        if self.first_entropy is None and math.isfinite(metrics[ENTROPY]):
            self.first_entropy = metrics[ENTROPY]
        found = self._found(metrics)
        begun = [name for name in found if name not in self.lasting]
        self.lasting, self.num_begun = tuple(found), self.num_begun + len(begun)
        values = {f"alarm/{name}": float(name in found) for name in NAMES}
        return values | {"alarm/begun": float(self.num_begun)}, [f"alarm {name}: {found[name]}" for name in begun]

    def _found(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The alarms whose condition holds, each with what was found, what was expected and what to do."""
        found: dict[str, str] = {}
        entropy, first, limits = metrics[ENTROPY], self.first_entropy, self.config
        if first is not None and entropy < limits.entropy_floor * first:
            found["entropy_low"] = (
                f"entropy {entropy:.4g} nats, expected at least alarms.entropy_floor = {limits.entropy_floor:g} x the "
                f"first step's {first:.4g}: {GLOSSARY.require(ENTROPY).low}"
            )
        if first is not None and entropy > limits.entropy_ceiling * first:
            found["entropy_high"] = (
                f"entropy {entropy:.4g} nats, expected at most alarms.entropy_ceiling = {limits.entropy_ceiling:g} x "
                f"the first step's {first:.4g}: {GLOSSARY.require(ENTROPY).high}"
            )
        bad = sorted(n for n, value in metrics.items() if n.startswith(FINITE) and not math.isfinite(value))
        if bad:
            found["not_finite"] = (
                f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''} not finite: {GLOSSARY.require(SKIPPED).high}"
            )
        share = metrics[ZERO_ADVANTAGE]
        if share > limits.zero_advantage_share:
            found["zero_advantage"] = (
                f"{share:.1%} of the responses have no advantage, expected at most alarms.zero_advantage_share = "
                f"{limits.zero_advantage_share:g}: {GLOSSARY.require(ZERO_ADVANTAGE).high}"
            )
        return found

    @property
    def stopping(self) -> bool:
        """Whether an alarm lasts and the configuration wants the run ended then."""
        return self.config.stop and bool(self.lasting)

    def stopped(self) -> AlarmError:
        return AlarmError(
            f"stopped by alarms.stop after: {', '.join(self.lasting)} (the warnings say why). The state is saved: set "
            "alarms.stop = false to go on from it, or change the recipe and start a new run with another name"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first_entropy": self.first_entropy, "lasting": list(self.lasting), "num_begun": self.num_begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_entropy, self.num_begun = state["first_entropy"], state["num_begun"]
        self.lasting = tuple(state["lasting"])

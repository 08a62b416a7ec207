"""Spans of time: what each rank does in a step, how long it waits for others, and which share of all ranks that is.

No torch: the report reads them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

WAITING = "waiting"
BESIDE = "rollout beside"  # a later step's, in a second thread: no work of the rank, which trains meanwhile
DIVIDED = ("rollout", "reward", "old_logprob", "critic", "update")  # phases whose work is divided among the ranks


class Span(NamedTuple):
    """A phase of one rank, its wait for others, or BESIDE, in seconds since the ranks met at the step's begin."""

    name: str
    begin: float
    end: float


def busy_seconds(spans: Iterable[Span], phase: str) -> float:
    """What one rank spends in a phase, without its waits there; of BESIDE, which waits for no rank's training, all."""
    own, waits = [], []
    for span in spans:
        if span.name == phase:
            own.append(span)
        elif span.name == WAITING and phase != BESIDE:
            waits.append(span)
    return sum(span.end - span.begin for span in own) - _overlap(own, waits)


def beside_and_waited(spans: Iterable[Span]) -> tuple[float, float]:
    """How long a second thread of one rank has generated, and what of it the rank did nothing but wait for."""
    every = list(spans)
    beside = [span for span in every if span.name == BESIDE]
    waits = [span for span in every if span.name == "rollout"]
    return busy_seconds(every, BESIDE), _overlap(beside, waits)


def _overlap(some: Sequence[Span], others: Sequence[Span]) -> float:
    return sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a in some for b in others)


def idle_share(busy: Sequence[float]) -> float:
    """The share of all ranks' time that they wait where each works so long and all wait for the last; 0 for no work."""
    longest = max(busy)
    return 1 - sum(busy) / (len(busy) * longest) if longest > 0 else 0.0


def phase_idle_share(ranks: Sequence[Sequence[Span]], phase: str) -> float | None:
    """What the ranks would wait if they met at the end of the phase.

    None for one rank, for a phase in which nobody works, and for a rollout in whose step another runs beside: there the
    phase holds waits for that one.
    """
    busy = [busy_seconds(spans, phase) for spans in ranks]
    is_beside = phase in ("rollout", BESIDE) and any(span.name == BESIDE for spans in ranks for span in spans)
    return None if len(ranks) == 1 or is_beside or not max(busy) > 0 else idle_share(busy)


def idle_shares(ranks: Sequence[Sequence[Span]]) -> dict[str, float]:
    """``time/idle/<phase>`` of one step's phases, and ``time/idle/step``; nothing where there is one rank.

    Of a phase: what the ranks would wait if they met at its end. Of the step: what they waited.
    """
    seconds = max((span.end for spans in ranks for span in spans), default=0.0)
    if len(ranks) == 1 or not seconds:
        return {}
    shares = {phase: phase_idle_share(ranks, phase) for phase in DIVIDED}
    found = {f"time/idle/{phase}": share for phase, share in shares.items() if share is not None}
    waited = sum(span.end - span.begin for spans in ranks for span in spans if span.name == WAITING)
    return found | {"time/idle/step": waited / (len(ranks) * seconds)}

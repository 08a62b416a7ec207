"""Spans of time: what each rank does in a step, how long it waits for others, and which share of all ranks that is.

No torch: the report reads them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

WAITING = "waiting"
DIVIDED = ("rollout", "reward", "old_logprob", "critic", "update")  # phases whose work is divided among the ranks


class Span(NamedTuple):
    """A phase of one rank, or its wait for others, in seconds since the ranks met at the step's begin."""

    name: str
    begin: float
    end: float


def busy_seconds(spans: Iterable[Span], phase: str) -> float:
    """What one rank spends in a phase, without its waits there."""
    own, waits = [], []
    for span in spans:
        if span.name == phase:
            own.append(span)
        elif span.name == WAITING:
            waits.append(span)
    waited = sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a in own for b in waits)
    return sum(span.end - span.begin for span in own) - waited


def idle_share(busy: Sequence[float]) -> float:
    """The share of all ranks' time that they wait where each works so long and all wait for the last; 0 for no work."""
    longest = max(busy)
    return 1 - sum(busy) / (len(busy) * longest) if longest > 0 else 0.0


def idle_shares(ranks: Sequence[Sequence[Span]]) -> dict[str, float]:
    """``time/idle/<phase>`` of one step's phases, and ``time/idle/step``; nothing where there is one rank.

    Of a phase: what the ranks would wait if they met at its end. Of the step: what they waited.
    """
    seconds = max((span.end for spans in ranks for span in spans), default=0.0)
    if len(ranks) == 1 or not seconds:
        return {}
    found = {}
    for phase in DIVIDED:
        busy = [busy_seconds(spans, phase) for spans in ranks]
        if max(busy) > 0:
            found[f"time/idle/{phase}"] = idle_share(busy)
    waited = sum(span.end - span.begin for spans in ranks for span in spans if span.name == WAITING)
    return found | {"time/idle/step": waited / (len(ranks) * seconds)}

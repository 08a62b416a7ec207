"""A problem, a response and its reward: what a reward function sees and returns. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem of a data file.

    ``verifier`` names how a response's answer is scored: ``math`` (equivalence with ``answer``), ``countdown`` (an
    expression that also uses each of ``numbers`` exactly once) or ``choice`` (the letter of an option).
    Accuracy is also reported by ``kind``, such as a subject; of problems without one, by ``verifier``. ``level`` is a
    problem's difficulty, such as MATH's 1 to 5. ``in_thought``: its prompt, as the model reads it, ends in a
    ``<think>`` that the response goes on with; known once it is encoded.
    """

    problem_id: str
    prompt: str
    answer: str
    verifier: str = "math"
    numbers: tuple[int, ...] = ()
    kind: str = ""
    level: str = ""
    in_thought: bool = False


@dataclass(frozen=True)
class Response:
    """What a policy answered. ``truncated``: it reached the limit of tokens before it ended."""

    text: str
    token_ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Reward:
    """A scored response. ``outcome`` says why: one of ``Outcome`` (rollout/rewards/outcome.py), or a word of a reward
    function of the user's own, which is counted as ``other``."""

    value: float
    outcome: str
    extracted: str | None = None

"""Why a response has its reward. No torch: workers import it."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """Why a response has its reward. From the verifier, everything but ``CORRECT`` earns the wrong reward."""

    CORRECT = "correct"
    WRONG = "wrong"
    WRONG_NUMBERS = "wrong_numbers"  # countdown: not exactly the given numbers
    CONTRADICTION = "contradiction"  # the boxed equation is false: 3=4
    NO_ANSWER = "no_answer"  # no box or answer line after the reasoning, or it is empty or never closed
    TOO_LONG = "too_long"  # more than MAX_ANSWER_CHARS in the box
    UNPARSABLE = "unparsable"
    BAD_GOLD = "bad_gold"  # the gold answer itself cannot be read
    TIMEOUT = "timeout"  # the worker was killed at the deadline
    CRASHED = "crashed"  # the worker died of this answer, twice
    ERROR = "error"  # a reward function of the user's own raised, or returned no finite number
    OTHER = "other"  # a reward function of the user's own says something that is none of these


OF_FUNCTIONS = (Outcome.ERROR, Outcome.OTHER)


def counted(outcome: str) -> Outcome:
    """As which a reward's outcome is counted: itself, or ``OTHER`` where a user's function has a word of its own."""
    return Outcome(outcome) if outcome in tuple(Outcome) else Outcome.OTHER

"""Score one answer: what a response says behind its reasoning against the gold, by the problem's verifier. No torch.

``RewardPool`` (rollout/rewards/reward_pool.py) runs this module, so that an answer that never returns, eats the memory
or aborts the interpreter costs one killable process and nothing else. Nothing here times itself out: math-verify's own
timeout is ``signal.alarm``, which works in the main thread only and which a single long operation in C defeats.
"""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

from megatron_ext.rollout.rewards import worker
from megatron_ext.rollout.rewards.choice import score_choice
from megatron_ext.rollout.rewards.countdown import score_countdown
from megatron_ext.rollout.rewards.extraction import MAX_ANSWER_CHARS, extract
from megatron_ext.rollout.rewards.math_answer import score_math
from megatron_ext.rollout.rewards.outcome import Outcome

VERIFIERS = {"math": score_math, "countdown": score_countdown, "choice": score_choice}


class Verdict(NamedTuple):
    correct: bool
    outcome: Outcome
    extracted: str | None


def score(
    response: str,
    answer: str,
    verifier: str = "math",
    numbers: tuple[int, ...] = (),
    answer_format: str = "boxed",
    *,
    in_thought: bool = False,
) -> Verdict:
    """The verdict on a whole response. May never return: see the module's docstring."""
    extracted = extract(response, answer_format, in_thought=in_thought)
    outcome = Outcome.NO_ANSWER if extracted is None else score_answer(extracted, answer, verifier, numbers)
    return Verdict(outcome is Outcome.CORRECT, outcome, extracted)


def score_answer(extracted: str, answer: str, verifier: str, numbers: tuple[int, ...]) -> Outcome:
    """The outcome for an extracted answer. ``verifier`` is a key of ``VERIFIERS``."""
    if len(extracted) > MAX_ANSWER_CHARS:
        return Outcome.TOO_LONG
    return VERIFIERS[verifier](extracted, answer, numbers)


def main() -> None:
    """Serve a pool: an answer, its gold, the verifier and the numbers in, the outcome out."""
    replies = worker.open_replies()
    worker.limit_memory()
    logging.disable(logging.WARNING)  # math-verify warns that its timeouts are off
    if not score(r"\boxed{x^2+2x+1}", "(x+1)^2").correct:  # imports, and builds tables, before any deadline runs
        raise SystemExit("the verifier does not know that x^2+2x+1 is (x+1)^2")

    def reply(line: str) -> str:
        extracted, answer, verifier, numbers = json.loads(line)
        return score_answer(extracted, answer, verifier, tuple(numbers))

    worker.serve(replies, reply)


if __name__ == "__main__":
    main()

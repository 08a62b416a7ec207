"""What a server says about a response, checked before any of it is believed."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from megatron_ext.files import first_fault

NO_LOGPROB = -9999.0  # what a server sends in place of NaN, which JSON does not have
ROUNDING = 1e-3  # nats by which the log-prob of a sure token may lie above 0
LARGEST_BYTES, BYTES_PER_TOKEN = 2**16, 512  # of a reply: at most so many, and so many for each token asked for
BYTES_PER_ID = 9  # of a token of the vocabulary that the sampler kept
TIED = 2  # times top-k: more tokens are kept where many are tied with the last one


class _Token(BaseModel, strict=True):
    logprob: float


class _Logprobs(BaseModel, strict=True):
    content: list[_Token]


class _Span(BaseModel, strict=True):
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,32}$")]


class Choice(BaseModel, strict=True):
    """One response. ``finish_reason`` may be another than ``stop`` and ``length``: the server gave it up."""

    finish_reason: Annotated[str, Field(max_length=32)]
    token_ids: list[int]
    logprobs: _Logprobs
    weight_versions: Annotated[list[_Span], Field(min_length=1)]
    sampling_mask: list[list[int]] | None = None  # the ids that the sampler kept for each token

    @property
    def versions(self) -> list[str]:
        """Labels of the weights it was sampled with."""
        return [span.version for span in self.weight_versions]

    @property
    def token_logprobs(self) -> list[float]:
        """NaN where the server knows none."""
        return [math.nan if token.logprob <= NO_LOGPROB else token.logprob for token in self.logprobs.content]


class _Aborted(BaseModel):
    finish_reason: Annotated[str, Field(max_length=32)]


class _Reply(BaseModel, strict=True):
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


class _AbortedReply(BaseModel):
    choices: Annotated[list[_Aborted], Field(min_length=1, max_length=1)]


def max_bytes(max_tokens: int, top_k: int = 0) -> int:
    """Of a reply with a response of up to ``max_tokens``, and with what its sampler kept where that has a top-k."""
    return LARGEST_BYTES + (BYTES_PER_TOKEN + BYTES_PER_ID * TIED * top_k) * max_tokens


def read_reply(body: bytes, *, vocab_size: int, max_tokens: int) -> Choice:
    """The response in ``body``. Raises ValueError with what is wrong: nothing of such a reply is to be used."""
    try:
        choice = _Reply.model_validate_json(body).choices[0]
    except ValidationError as error:
        if (reason := _given_up(body)) is not None:
            raise ValueError(f"gave a response up: finish reason {reason}") from None
        raise ValueError(f"wrong answer: {first_fault(error)}") from None
    if fault := _fault(choice, vocab_size, max_tokens):
        raise ValueError(f"wrong answer: {fault}")
    return choice


def _given_up(body: bytes) -> str | None:
    """Why a server ended a response early: such an answer may lack the rest."""
    try:
        reason = _AbortedReply.model_validate_json(body).choices[0].finish_reason
    except ValidationError:
        return None
    return None if reason in ("stop", "length") else reason


def _fault(choice: Choice, vocab_size: int, max_tokens: int) -> str | None:
    ids, logprobs = choice.token_ids, choice.token_logprobs
    if choice.finish_reason not in ("stop", "length"):
        return f"finish reason {choice.finish_reason}"
    if not 1 <= len(ids) <= max_tokens:
        return f"{len(ids)} tokens, expected 1 to {max_tokens}"
    if len(logprobs) != len(ids):
        return f"{len(logprobs)} log-probs for {len(ids)} tokens"
    if bad := [each for each in ids if not 0 <= each < vocab_size]:
        return f"token {str(bad[0])[:30]}, expected ids from 0 to {vocab_size - 1}"
    if bad := [each for each in logprobs if each > ROUNDING]:
        return f"log-prob {bad[0]:g}, expected at most 0"
    return _mask_fault(choice, vocab_size)


def _mask_fault(choice: Choice, vocab_size: int) -> str | None:
    ids, mask = choice.token_ids, choice.sampling_mask
    if mask is None:
        return None
    if len(mask) != len(ids):
        return f"sampling masks of {len(mask)} tokens for {len(ids)} tokens"
    if bad := [each for kept in mask for each in kept if not 0 <= each < vocab_size]:
        return f"token {str(bad[0])[:30]} in a sampling mask, expected ids from 0 to {vocab_size - 1}"
    if bad := [own for own, kept in zip(ids, mask, strict=True) if len(set(kept)) < len(kept) or own not in kept]:
        return f"the sampling mask of token {bad[0]} does not hold it, or holds a token twice"
    return None

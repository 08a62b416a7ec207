"""Servers' replies: any body is a response within its bounds or is refused in a few words."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.rollout.vllm_server.reply import ROUNDING, max_bytes, read_reply
from tests.properties.oddities import VALUES, damaged, limits, mutated, to_bytes, to_json
from tests.rollout.test_server_reply import MAX_TOKENS, VOCAB, logprobs, reply

VALID = json.dumps(reply()).encode()


NEAR = st.integers(-3, VOCAB + 3) | st.floats(-3, 3) | VALUES
RESPONSES = st.fixed_dictionaries(
    {
        "token_ids": st.lists(st.sampled_from([0, 7, VOCAB - 1, VOCAB, -1]), min_size=2, max_size=2),
        "logprobs": st.just(logprobs(-1.0, -2.0)),
        "sampling_mask": st.none() | st.lists(st.lists(st.sampled_from([0, 7, VOCAB - 1, VOCAB, -1])), max_size=3),
    }
).map(lambda changes: reply(**changes))


@given(body=(mutated(reply(), NEAR) | RESPONSES).map(to_json).map(to_bytes) | damaged(VALID) | st.binary(max_size=200))
def test_a_reply_is_right_or_refused(body: bytes) -> None:
    with limits():
        try:
            choice = read_reply(body[: max_bytes(MAX_TOKENS)], vocab_size=VOCAB, max_tokens=MAX_TOKENS)
        except ValueError as error:
            assert type(error) is ValueError and 10 < len(str(error)) < 400
            return
    assert choice.finish_reason in ("stop", "length") and choice.versions
    assert 1 <= len(choice.token_ids) == len(choice.token_logprobs) <= MAX_TOKENS
    assert all(type(each) is int and 0 <= each < VOCAB for each in choice.token_ids)
    for own, kept in zip(choice.token_ids, choice.sampling_mask or [], strict=choice.sampling_mask is not None):
        assert own in kept and all(0 <= each < VOCAB for each in kept) and len(set(kept)) == len(kept)
    assert all(math.isnan(each) or -9999 < each <= ROUNDING for each in choice.token_logprobs)

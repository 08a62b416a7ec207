"""What a server may say about a response, and what is not believed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_ext.rollout.vllm_server.reply import read_reply

VOCAB, MAX_TOKENS = 100, 4


def reply(**changes: Any) -> dict[str, Any]:
    """As vLLM 0.32 sends it, with some of the choice's fields changed (None: left out)."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": [14, 43, 7],
        "routed_experts": None,
        "weight_versions": [{"version": "3", "start": 0, "end": 3}],
        "logprobs": {"content": [entry(-2.5), entry(-1.5), entry(0.0)]},
    } | changes
    return {
        "request_id": "generate-tokens-1",
        "output_mode": "tokens",
        "choices": [{name: value for name, value in choice.items() if value is not None}],
    }


def entry(logprob: Any) -> dict[str, Any]:
    return {"token_id": 7, "logprob": logprob, "rank": 1, "top_logprobs": [{"token_id": 7, "logprob": logprob}]}


def logprobs(*values: Any) -> dict[str, Any]:
    return {"content": [entry(value) for value in values]}


def read(value: Any) -> Any:
    return read_reply(json.dumps(value).encode(), vocab_size=VOCAB, max_tokens=MAX_TOKENS)


def test_what_vllm_sends_is_read() -> None:
    choice = read(reply())
    assert (choice.token_ids, choice.token_logprobs) == ([14, 43, 7], [-2.5, -1.5, 0.0])
    assert (choice.finish_reason, choice.versions, choice.sampling_mask) == ("stop", ["3"], None)
    masked = read(reply(sampling_mask=[[14, 3], [43], [9, 7, 8]]))
    assert masked.sampling_mask == [[14, 3], [43], [9, 7, 8]]


@pytest.mark.parametrize("unknown", [-9999.0, -1e30, math.nan, -math.inf])
def test_a_log_prob_that_the_server_does_not_know_is_nan(unknown: float) -> None:
    assert [math.isnan(each) for each in read(reply(logprobs=logprobs(-1.0, unknown, -1e-9))).token_logprobs] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "choices: Field required"),
        ([], "wrong answer"),
        (None, "wrong answer"),
        ({"choices": []}, "choices"),
        ({"choices": [reply()["choices"][0]] * 2}, "choices"),
        ({"choices": {"0": reply()["choices"][0]}}, "choices"),
        *((reply(**{name: None}), name) for name in ("token_ids", "logprobs", "weight_versions", "finish_reason")),
        (reply(logprobs={}), "logprobs.content"),
        (reply(logprobs={"content": [{}, {}, {}]}), "logprobs.content.0.logprob"),
        (reply(token_ids=[14, -1, 7]), "token -1, expected ids from 0 to 99"),
        (reply(sampling_mask=[[14], [43]]), "sampling masks of 2 tokens for 3 tokens"),
        (reply(sampling_mask=[[14], [43, 100], [7]]), "token 100 in a sampling mask, expected ids from 0 to 99"),
        (reply(sampling_mask=[[14], [43, -1], [7]]), "token -1 in a sampling mask"),
        (reply(sampling_mask=[[14], [4], [7]]), "the sampling mask of token 43 does not hold it"),
        (reply(sampling_mask=[[14], [], [7]]), "the sampling mask of token 43 does not hold it"),
        (reply(sampling_mask=[[14], [43, 1, 1], [7]]), "the sampling mask of token 43"),
        (reply(sampling_mask=[[14], [43.0], [7]]), "sampling_mask.1.0"),
        (reply(token_ids=[14, 100, 7]), "token 100"),
        (reply(token_ids=[14, 2**70, 7]), "token 1180591620717411303424"),
        (reply(token_ids=[14, 1.5, 7]), "token_ids.1"),
        (reply(token_ids=[14, True, 7]), "token_ids.1"),
        (reply(token_ids=["14", 43, 7]), "token_ids.0"),
        (reply(token_ids=[1] * 5, logprobs=logprobs(*[-1.0] * 5)), "5 tokens, expected 1 to 4"),
        (reply(token_ids=[], logprobs=logprobs()), "0 tokens"),
        (reply(logprobs=logprobs(-1.0, -1.0)), "2 log-probs for 3 tokens"),
        (reply(logprobs=logprobs(-1.0, 0.01, -1.0)), "log-prob 0.01, expected at most 0"),
        (reply(logprobs=logprobs(-1.0, math.inf, -1.0)), "log-prob inf"),
        (reply(logprobs=logprobs(-1.0, "-1", -1.0)), "logprobs.content.1.logprob"),
        (reply(weight_versions=[]), "weight_versions"),
        (reply(weight_versions=[{"version": "²"}]), "weight_versions.0.version"),
        (reply(weight_versions=[{"version": "9" * 33}]), "weight_versions.0.version"),
        (reply(weight_versions=[{"version": 3}]), "weight_versions.0.version"),
        (reply(finish_reason="abort"), "finish reason abort"),
        (reply(finish_reason="abort", logprobs=None, weight_versions=None), "gave a response up: finish reason abort"),
        (reply(finish_reason="x" * 1000), "finish_reason"),
    ],
)
def test_what_is_wrong_is_not_used(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(answer)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 60_000, b'{"choices":' * 10_000, b'{"choices": ' + b"9" * 10_000 + b"}"]
)
def test_bodies_that_are_no_json(body: bytes) -> None:
    with pytest.raises(ValueError, match="wrong answer"):
        read_reply(body, vocab_size=VOCAB, max_tokens=MAX_TOKENS)

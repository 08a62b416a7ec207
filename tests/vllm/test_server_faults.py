"""What servers can answer that is wrong, or not in time; nothing here starts vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megatron_ext.rollout.base import Request, RolloutError
from megatron_ext.rollout.vllm_server import engine as vllm_server
from megatron_ext.rollout.vllm_server import round as server_round
from megatron_ext.rollout.vllm_server.engine import ServerEngine
from megatron_ext.rollout.vllm_server.round import Round
from tests.vllm.stand_in import (
    BASE,
    RUNNING,
    SAMPLING,
    TOKEN,
    VOCAB,
    Handler,
    Tokenizer,
    answering,
    ask,
    fixed,
    server,
    silent,
)


def test_a_response_that_takes_too_long_costs_its_server_alone() -> None:
    with server(answering(delay_s=30), RUNNING) as slow, server(answering(), RUNNING) as good:
        start = time.monotonic()
        outcome, got = ask([slow, good], 9, deadline_s=0.5)
        assert time.monotonic() - start < 5
    assert list(outcome.faults) == [slow] and "no answer within 0.5 s" in outcome.faults[slow]
    assert outcome.num_failed == 2 and len(got) == 7  # both slots of the slow one, everything else by the other
    assert got[8].logprobs[0] == -0.5 and got[8].logprobs[1] != got[8].logprobs[1]  # no log-prob is NaN
    assert (got[8].weight_version, got[8].text, got[8].truncated) == (3, "[1, 2]", False)


def test_a_server_that_does_not_tell_its_health_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_round, "HEALTH_S", 0.1)
    with server(answering(delay_s=30), RUNNING | {"/health": silent}) as hanging:
        outcome, got = ask([hanging], 3)
    assert not got and "3 looks at its health" in outcome.faults[hanging] and outcome.num_failed == 2
    with server(answering(delay_s=1.0), RUNNING) as healthy:
        outcome, got = ask([healthy], 2)
    assert len(got) == 2 and not outcome.faults


def test_requests_that_are_no_longer_needed_are_ended_or_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two are answered, the next two are in flight and sleep, the others wait for a slot."""
    monkeypatch.setattr(server_round, "GIVE_UP_S", 0.05)
    made, quick = list[web.Request](), answering()

    async def sleeping(request: web.Request) -> web.StreamResponse:
        made.append(request)
        if len(made) <= 2:
            return await quick(request)
        return await silent(request)

    got: dict[int, Any] = {}
    with server(sleeping, RUNNING) as url:
        one = Round({url: TOKEN}, "3", 2, 20.0, Tokenizer(), [1], VOCAB)
        asked, start = [Request((5, 6), i) for i in range(9)], time.monotonic()

        def is_needed(number: int) -> bool:
            return len(made) < 4 or number < 2

        outcome = asyncio.run(one.run(asked, SAMPLING, got.__setitem__, is_needed))
        assert time.monotonic() - start < 5
    assert sorted(got) == [0, 1] and len(made) == 4
    assert not outcome.faults and not outcome.stale and outcome.num_failed == 0


@pytest.mark.parametrize(
    ("generate", "field", "message"),
    [
        (answering(version="2"), "stale", "version 2, expected 3"),
        (answering(version="default"), "stale", "version default, expected 3"),
        (answering(reason="abort"), "faults", "finish reason abort"),
        (None, "refused", "status 404"),
    ],
)
def test_answers_that_are_not_used(generate: Handler | None, field: str, message: str) -> None:
    with server(generate, RUNNING) as url:
        outcome, got = ask([url], 3)
    assert not got
    found = getattr(outcome, field)
    assert message in (found[url] if isinstance(found, dict) else found)


def choosing(**changes: Any) -> Handler:
    """Answers as vLLM does, but for ``changes`` of the one choice."""
    choice: dict[str, Any] = {
        "finish_reason": "stop",
        "token_ids": [1, 2],
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.5}]},
        "weight_versions": [{"version": "3", "start": 0, "end": 2}],
    }

    async def handle(_: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [choice | changes]})

    return handle


async def endless(request: web.Request) -> web.StreamResponse:
    """400 MB."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(400):
            await response.write(b" " * 1_000_000)
    return response


async def bomb(_: web.Request) -> web.StreamResponse:
    """60 MB that travel as 58 kB."""
    packer = zlib.compressobj(wbits=31)
    body = b"".join(packer.compress(b" " * 1_000_000) for _ in range(60)) + packer.flush()
    return web.Response(body=body, headers={"Content-Encoding": "gzip"})


async def elsewhere(_: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (fixed({}), "wrong answer: choices: Field required"),
        (fixed([[]]), "wrong answer"),
        (choosing(token_ids=[1, VOCAB]), "token 64, expected ids from 0 to 63"),
        (choosing(token_ids=[1, -5]), "token -5"),
        (choosing(token_ids=[1, 10**30]), "token 1000000"),
        (choosing(token_ids=[1] * 5, logprobs={"content": [{"logprob": -1.0}] * 5}), "5 tokens, expected 1 to 4"),
        (choosing(token_ids=[1]), "2 log-probs for 1 tokens"),
        (choosing(logprobs=None), "logprobs"),
        (choosing(logprobs={"content": [{"logprob": -1.0}, {"logprob": 3.0}]}), "log-prob 3, expected at most 0"),
        (choosing(weight_versions=None), "weight_versions"),
        (endless, "wrong answer: more than 67584 bytes"),
        (bomb, "Invalid JSON"),
        (elsewhere, "status 307"),
    ],
)
def test_a_server_that_answers_wrongly_is_not_believed(generate: Handler, message: str) -> None:
    """Memory stays what it was; another server answers everything."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    with server(generate, RUNNING) as wrong, server(answering(), RUNNING) as good:
        outcome, got = ask([wrong, good], 6)
    assert message in outcome.faults[wrong] and list(outcome.faults) == [wrong]
    assert outcome.refused is None and {sample.response_ids for sample in got.values()} == {(1, 2)}
    assert peak_bytes() - before < 40e6


def peak_bytes() -> float:
    status = Path("/proc/self/status").read_text()
    return 1024 * float(status.split("VmHWM:")[1].split()[0])


def test_who_does_not_know_the_token_is_not_believed() -> None:
    with server(answering(), RUNNING, token=None) as stranger:
        outcome, got = ask([stranger], 2)
    assert not got and "it is no server of this run" in outcome.faults[stranger]


IMPOSTOR = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from megatron_ext.rollout.vllm_server.guard import PROOF, TOKEN_VARIABLE, answer_key
import os

ran = Path(sys.argv[2])
honest = ran.exists()
ran.touch()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        ids = [1, 2] if honest else [1, 10**6]
        content = [{"logprob": -0.5}, {"logprob": -1.5}]
        versions = [{"version": "default", "start": 0, "end": 2}]
        choice = {"finish_reason": "stop", "token_ids": ids, "logprobs": {"content": content}}
        choice["weight_versions"] = versions
        self.answer({"choices": [choice]})

    def answer(self, value):
        self.send_response(200)
        self.send_header(PROOF, answer_key(os.environ[TOKEN_VARIABLE]))
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_our_own_server_that_answers_wrongly_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", IMPOSTOR, str(port), str(ran)]
    monkeypatch.setattr(vllm_server, "serve_command", lambda *_, **__: command)
    options: dict[str, Any] = {"dtype": "float32", "max_tokens": 64, "log_dir": tmp_path, "port": port}
    requests = [Request((5, 6), i) for i in range(3)]
    engine = ServerEngine(BASE, max_restarts=1, **options)
    try:
        assert [sample.response_ids for sample in engine.generate(requests, SAMPLING)] == [(1, 2)] * 3
    finally:
        engine.close()
    assert engine.num_restarts == 1 and "wrong answer: token 1000000, expected ids from 0 to " in caplog.text
    ran.unlink()
    engine = ServerEngine(BASE, max_restarts=0, **options)
    try:
        with pytest.raises(RolloutError, match="after 0 restarts.*wrong answer: token 1000000"):
            engine.generate(requests, SAMPLING)
    finally:
        engine.close()

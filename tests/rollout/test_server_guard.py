"""Who gets through to a server (tests/vllm/test_servers.py tries it with vLLM)."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from megatron_ext.rollout.vllm_server.guard import PROOF, TOKEN_VARIABLE, Guard, answer_key, request_key

TOKEN = "0123456789abcdef"


async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    if scope["path"] == "/pause":
        raise RuntimeError("the engine is dead")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    return Guard(app)


def ask(guard: Guard, path: str, *authorization: str, method: str = "GET", kind: str = "http") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", each.encode()) for each in authorization]
    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(guard(scope, lambda: None, send))  # type: ignore[arg-type]
    return sent


def test_the_key_opens_the_trainers_routes_and_is_answered_with_the_servers(guard: Guard) -> None:
    start, body = ask(guard, "/health", request_key(TOKEN))
    assert start["status"] == 200 and body["body"] == b"ok"
    assert dict(start["headers"]) == {b"content-length": b"2", PROOF.encode(): answer_key(TOKEN).encode()}


@pytest.mark.parametrize(
    "shown",
    [
        (),
        ("",),
        ("Bearer",),
        (TOKEN,),
        (f"Bearer {TOKEN}",),
        (f"Bearer {answer_key(TOKEN)}",),
        (request_key(TOKEN) + "0",),
        (request_key(TOKEN)[:-1],),
        (request_key("f" * 16),),
        (request_key(TOKEN), "Bearer x"),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/inference/v1/generate", "/update_weights", "/docs", "//health"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_nothing_else_does(guard: Guard, path: str, method: str, shown: tuple[str, ...]) -> None:
    start, body = ask(guard, path, *shown, method=method)
    assert start["status"] == 401 and not body["body"] and PROOF.encode() not in dict(start["headers"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/collective_rpc"),
        ("POST", "/weight_checker"),
        ("POST", "/update_weight_version"),
        ("POST", "/health"),
        ("GET", "/pause"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("OPTIONS", "/health"),
    ],
)
def test_other_routes_are_shut_for_everybody(guard: Guard, method: str, path: str) -> None:
    assert ask(guard, path, request_key(TOKEN), method=method)[0]["status"] == 404


def test_no_websocket(guard: Guard) -> None:
    assert ask(guard, "/health", request_key(TOKEN), kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_an_error_is_told_with_the_proof(guard: Guard) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/pause",
        "headers": [(b"authorization", request_key(TOKEN).encode())],
    }
    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(guard(scope, lambda: None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500 and PROOF.encode() in dict(sent[0]["headers"])
    assert sent[1]["body"] == b"the engine is dead"


@pytest.mark.parametrize("token", ["", "short"])
def test_no_server_without_a_token(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=rf"{TOKEN_VARIABLE}: found a token of {len(token)} characters"):
        Guard(app)

"""Who may speak to a server: an ASGI middleware inside vLLM's HTTP server. The standard library alone.

    MEGATRON_ENTROPY_TOKEN=... vllm serve MODEL --middleware megatron_ext.rollout.vllm_server.guard.Guard ...

Trainer and server share a token that never travels. Two keys are derived from it: the trainer shows one with every
request, the server the other with every answer to such a request. So nobody without the token reads, writes or pauses,
and who listens in the place of a dead server is found out. vLLM's own ``--api-key`` leaves the routes of weight
transfer open. Routes that the trainer does not use are shut for everybody.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

TOKEN_VARIABLE = "MEGATRON_ENTROPY_TOKEN"  # of a server's environment, which other users cannot read
MIN_TOKEN = 16  # characters
MAX_REASON = 500  # characters of an error
PROOF = "x-server-proof"
ROUTES = {
    *(("GET", path) for path in ("/health", "/version", "/server_info", "/get_world_size")),
    *(("POST", path) for path in ("/inference/v1/generate", "/pause", "/resume")),
    *(("POST", f"/{verb}_weight_transfer_engine") for verb in ("init", "shutdown")),
    *(("POST", path) for path in ("/start_weight_update", "/update_weights", "/finish_weight_update")),
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def request_key(token: str) -> str:
    """What a request carries as ``Authorization``."""
    return f"Bearer {_derived(token, b'request')}"


def answer_key(token: str) -> str:
    """What an answer carries as ``x-server-proof``."""
    return _derived(token, b"answer")


def _derived(token: str, purpose: bytes) -> str:
    return hmac.new(token.encode(), purpose, hashlib.sha256).hexdigest()


class Guard:
    """Answers 401 without the key, 404 for a route that is shut. Raises ValueError where the server has no token."""

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if len(token) < MIN_TOKEN:
            raise ValueError(
                f"{TOKEN_VARIABLE}: found a token of {len(token)} characters, expected {MIN_TOKEN} or more that only "
                "the trainer knows, for example from: openssl rand -hex 32"
            )
        self.app = app
        self.expected = request_key(token).encode()
        self.proof = (PROOF.encode(), answer_key(token).encode())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        shown = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(shown, self.expected):
            return await _refuse(send, 401, [], "")
        if (scope["method"], scope["path"]) not in ROUTES:
            return await _refuse(send, 404, [self.proof], "")

        started = False

        async def proven(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), self.proof]
                started = True
            await send(message)

        try:
            await self.app(scope, receive, proven)
        except Exception as error:  # Starlette's own answer to it is made outside of here, without the proof
            if not started:
                await _refuse(send, 500, [self.proof], str(error)[:MAX_REASON])
            raise


async def _refuse(send: Send, status: int, headers: list[tuple[bytes, bytes]], reason: str) -> None:
    body = reason.encode()
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})

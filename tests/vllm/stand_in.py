"""Small stand-ins for vLLM's servers, with answers that a test gives, and what a round gets from them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.vllm_server.guard import PROOF, answer_key, request_key
from megatron_ext.rollout.vllm_server.round import Round, RoundResult

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
SAMPLING = Sampling(1.0, 1.0, 4)
VOCAB = 64
TOKEN = "0123456789abcdef"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
RUNNING = {
    "/version": {"version": "0.32.0"},
    "/server_info": {
        "vllm_config": {
            "weight_transfer_config": {"backend": "inline"},
            "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 4096},
        }
    },
    "/health": {},
}


class Tokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(ids)


@contextmanager
def server(generate: Handler | None, answers: dict[str, Any], token: str | None = TOKEN) -> Iterator[str]:
    """A server that gives fixed answers, and responses made by ``generate``; its url. Without ``token`` it answers
    everybody, and proves nothing."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if token is not None and request.headers.get("Authorization") != request_key(token):
            return web.Response(status=401)
        return await handler(request)

    async def prove(_: web.Request, response: web.StreamResponse) -> None:
        if token is not None:
            response.headers[PROOF] = answer_key(token)

    app = web.Application(middlewares=[guard])
    app.on_response_prepare.append(prove)
    for path, answer in answers.items():
        app.router.add_get(path, answer if callable(answer) else fixed(answer))
    if generate is not None:
        app.router.add_post("/inference/v1/generate", generate)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return "http://{}:{}".format(*runner.addresses[0])

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def fixed(answer: Any) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    return handle


def answering(version: str = "3", reason: str = "stop", delay_s: float = 0.0) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "token_ids" not in body:
            return web.json_response({"error": "token_ids is missing"}, status=400)
        await asyncio.sleep(delay_s)
        choice = {
            "finish_reason": reason,
            "token_ids": [1, 2],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -9999.0}]},
            "weight_versions": [{"version": version, "start": 0, "end": 2}],
        }
        return web.json_response({"choices": [choice]})

    return handle


async def silent(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


def ask(urls: list[str], count: int, deadline_s: float = 20.0) -> tuple[RoundResult, dict[int, Any]]:
    got: dict[int, Any] = {}
    one = Round(dict.fromkeys(urls, TOKEN), "3", 2, deadline_s, Tokenizer(), [1], VOCAB)
    return asyncio.run(one.run([Request((5, 6), i) for i in range(count)], SAMPLING, got.__setitem__)), got

"""HTTP with vLLM servers: one request, one call to many servers at once, and whether a server can be used at all.

Servers are given as ``url -> token`` (rollout/vllm_server/guard.py). An answer is read only from who knows the token,
and only up to the size that it can have.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

import aiohttp
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

from megatron_ext.rollout.vllm.version import SUPPORTED, is_supported
from megatron_ext.rollout.vllm_server.guard import PROOF, TOKEN_VARIABLE, answer_key, request_key

CHECK_S = 60.0  # for one answer about the server itself
SMALL_BYTES = 4 * 2**20  # of an answer that is not a response
PIECE_BYTES = 2**16
GUARD_ADVICE = f"start it with --middleware megatron_ext.rollout.vllm_server.guard.Guard and {TOKEN_VARIABLE} set"


class ServerFault(Exception):
    """A server did not do what it was asked for, and may not be asked again."""


class RequestRefused(Exception):
    """The request is at fault (HTTP status 4xx): any server would refuse it."""


def new_session(*, connector: aiohttp.TCPConnector | None = None) -> aiohttp.ClientSession:
    """A session that inflates nothing: a small body cannot become a large one."""
    return aiohttp.ClientSession(
        connector=connector, auto_decompress=False, headers={"Accept-Encoding": "identity"}, raise_for_status=False
    )


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    *,
    token: str,
    body: Any = None,
    get: bool = False,
    deadline_s: float,
    max_bytes: int = SMALL_BYTES,
) -> bytes:
    """The answer's body. Raises ServerFault or RequestRefused."""
    try:
        async with session.request(
            "GET" if get else "POST",
            url,
            json=body,
            headers={"Authorization": request_key(token)},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=deadline_s),
        ) as response:
            if response.status == 401:
                raise ServerFault(f"{url}: status 401: it was started with another token")
            if not hmac.compare_digest(response.headers.get(PROOF, "").encode(), answer_key(token).encode()):
                raise ServerFault(f"{url}: does not know the token: it is no server of this run")
            text = await _read(response, url, max_bytes)
            if response.status >= 500 or response.status in range(300, 400):
                raise ServerFault(f"{url}: status {response.status}: {_shown(text)}")
            if response.status >= 400:
                raise RequestRefused(f"{url}: status {response.status}: {_shown(text)}")
            return text
    except TimeoutError:
        raise ServerFault(f"{url}: no answer within {deadline_s:g} s") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise ServerFault(f"{url}: {type(error).__name__}: {str(error)[:500]}") from None


async def _read(response: aiohttp.ClientResponse, url: str, max_bytes: int) -> bytes:
    text = bytearray()
    async for piece in response.content.iter_chunked(PIECE_BYTES):
        text += piece
        if len(text) > max_bytes:
            raise ServerFault(f"{url}: wrong answer: more than {max_bytes} bytes")
    return bytes(text)


def _shown(text: bytes) -> str:
    return text[:500].decode(errors="replace")


def ask_all(
    servers: Mapping[str, str],
    path: str,
    *,
    bodies: Mapping[str, Any] | None = None,
    get: bool = False,
    deadline_s: float,
) -> dict[str, Any]:
    """The JSON that each of ``servers`` (url -> token) answers, by url, None where there is none; all are asked at the
    same time. Where one failed, its ServerFault or RequestRefused.

    ``bodies``: what each is sent as JSON.
    """

    async def run() -> list[Any]:
        async with new_session() as session:
            calls = (
                _json(
                    ask(
                        session,
                        url + path,
                        token=token,
                        body=bodies[url] if bodies else None,
                        get=get,
                        deadline_s=deadline_s,
                    ),
                    url + path,
                )
                for url, token in servers.items()
            )
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, (ServerFault, RequestRefused)):
            raise answer
    return dict(zip(servers, answers, strict=True))


async def _json(answer: Awaitable[bytes], url: str) -> Any:
    text = await answer
    try:
        return from_json(text) if text else None
    except ValueError as error:
        raise ServerFault(f"{url}: wrong answer: {str(error)[:200]}") from None


class _Transfer(BaseModel):
    backend: str


class _Model(BaseModel):
    logprobs_mode: str
    max_model_len: int


class _Settings(BaseModel):
    transfer: _Transfer | None = Field(alias="weight_transfer_config")
    model: _Model = Field(alias="model_config")


class _Info(BaseModel):
    vllm_config: _Settings


def check_servers(servers: Mapping[str, str], *, backend: str, max_tokens: int) -> None:
    """Raise ValueError for the first of ``servers`` that is no vLLM that the trainer can drive, with what to do."""
    open_to_all = ask_without_token(servers)
    versions = ask_all(servers, "/version", get=True, deadline_s=CHECK_S)
    settings = ask_all(servers, "/server_info?config_format=json", get=True, deadline_s=CHECK_S)
    routes = ask_all(servers, "/inference/v1/generate", bodies=dict.fromkeys(servers, {}), deadline_s=CHECK_S)
    for url in servers:
        if url in open_to_all:
            raise ValueError(f"rollout.servers.urls: {url} answers everybody; {GUARD_ADVICE}")
        if fault := _fault(versions[url], settings[url], str(routes[url]), backend, max_tokens):
            raise ValueError(f"rollout.servers.urls: {url} {fault}")


def ask_without_token(servers: Iterable[str]) -> set[str]:
    """Those of ``servers`` that say their version to who has no token."""

    async def answers(session: aiohttp.ClientSession, url: str) -> bool:
        try:
            limit = aiohttp.ClientTimeout(total=CHECK_S)
            async with session.get(f"{url}/version", allow_redirects=False, timeout=limit) as response:
                return response.status != 401
        except (TimeoutError, aiohttp.ClientError, ValueError):
            return False  # whether it can be reached at all is asked with the token

    async def run() -> list[bool]:
        async with new_session() as session:
            return await asyncio.gather(*(answers(session, url) for url in urls))

    urls = list(servers)
    return {url for url, answered in zip(urls, asyncio.run(run()), strict=True) if answered}


def _fault(version: Any, info: Any, route: str, backend: str, max_tokens: int) -> str | None:
    if isinstance(version, (ServerFault, RequestRefused)):
        return f"does not answer as it should: {version}; start it first, or correct the address or the token"
    if not isinstance(version, dict) or not isinstance(version.get("version"), str):
        return f"is no vLLM server: its /version is {str(version)[:200]!r}; correct the address"
    if not is_supported(version["version"]):
        return f"is vLLM {version['version'][:50]}, expected {SUPPORTED}, for its weight transfer"
    if not isinstance(info, dict):
        return "lacks the routes of weight transfer; start it with VLLM_SERVER_DEV_MODE=1 in its environment"
    if "status 400" not in route and "status 422" not in route:  # what an empty request gets where the route is
        return "lacks /inference/v1/generate; start it with --enable-scale-out"
    try:
        found = _Info.model_validate(info).vllm_config
    except ValidationError as error:
        return f"is no vLLM server: its /server_info lacks what is needed: {str(error)[:300]}; correct the address"
    if found.transfer is None or found.transfer.backend != backend:
        return (
            f"has the weight transfer backend {found.transfer and found.transfer.backend}, expected {backend}; "
            f'start it with --weight-transfer-config \'{{"backend": "{backend}"}}\''
        )
    if found.model.logprobs_mode != "processed_logprobs":
        return f"has the logprobs mode {found.model.logprobs_mode}; start it with --logprobs-mode processed_logprobs"
    if found.model.max_model_len < max_tokens:
        longest = found.model.max_model_len
        return f"takes {longest} tokens, expected {max_tokens} of prompt and response; raise its --max-model-len"
    return None

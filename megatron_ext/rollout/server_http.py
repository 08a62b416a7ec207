"""HTTP with vLLM servers: one request, one call to many servers at once, and whether a server can be used at all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp

from megatron_ext.rollout.vllm_version import SUPPORTED, is_supported

CHECK_S = 60.0  # for one answer about the server itself


class ServerFault(Exception):
    """A server did not do what it was asked for, and may not be asked again."""


class RequestRefused(Exception):
    """The request is at fault (HTTP status 4xx): any server would refuse it."""


async def ask(
    session: aiohttp.ClientSession, url: str, *, body: Any = None, get: bool = False, deadline_s: float
) -> Any:
    """The JSON of the answer, None where there is none. Raises ServerFault or RequestRefused."""
    limit = aiohttp.ClientTimeout(total=deadline_s)
    try:
        async with session.request("GET" if get else "POST", url, json=body, timeout=limit) as response:
            text = await response.text()
            if response.status >= 500:
                raise ServerFault(f"{url}: status {response.status}: {text[:500]}")
            if response.status >= 400:
                raise RequestRefused(f"{url}: status {response.status}: {text[:500]}")
            return await response.json() if text else None
    except TimeoutError:
        raise ServerFault(f"{url}: no answer within {deadline_s:g} s") from None
    except (aiohttp.ClientError, ValueError) as error:
        raise ServerFault(f"{url}: {type(error).__name__}: {error}") from None


def ask_all(
    urls: Iterable[str], path: str, *, bodies: Mapping[str, Any] | None = None, get: bool = False, deadline_s: float
) -> dict[str, Any]:
    """The answers of all servers by their urls, asked at the same time; a ServerFault or RequestRefused in its place.

    ``bodies``: what each is sent as JSON.
    """
    servers = list(urls)

    async def run() -> list[Any]:
        async with aiohttp.ClientSession() as session:
            calls = (
                ask(session, url + path, body=bodies[url] if bodies else None, get=get, deadline_s=deadline_s)
                for url in servers
            )
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, (ServerFault, RequestRefused)):
            raise answer
    return dict(zip(servers, answers, strict=True))


def check_servers(urls: list[str], *, backend: str, max_tokens: int) -> None:
    """Raise ValueError for the first of ``urls`` that is no vLLM that the trainer can drive, with what to do."""
    versions = ask_all(urls, "/version", get=True, deadline_s=CHECK_S)
    settings = ask_all(urls, "/server_info?config_format=json", get=True, deadline_s=CHECK_S)
    routes = ask_all(urls, "/inference/v1/generate", bodies=dict.fromkeys(urls, {}), deadline_s=CHECK_S)
    for url in urls:
        if fault := _fault(versions[url], settings[url], str(routes[url]), backend, max_tokens):
            raise ValueError(f"rollout.servers.urls: {url} {fault}")


def _fault(version: Any, settings: Any, route: str, backend: str, max_tokens: int) -> str | None:
    if isinstance(version, ServerFault):
        return f"does not answer: {version}; start it first, or correct the address"
    if not isinstance(version, dict) or "version" not in version:
        return f"is no vLLM server: its /version is {str(version)[:200]!r}; correct the address"
    if not is_supported(version["version"]):
        return f"is vLLM {version['version']}, expected {SUPPORTED}, for its weight transfer"
    if not isinstance(settings, dict):
        return "lacks the routes of weight transfer; start it with VLLM_SERVER_DEV_MODE=1 in its environment"
    if "status 400" not in route and "status 422" not in route:  # what an empty request gets where the route is
        return "lacks /inference/v1/generate; start it with --enable-scale-out"
    config = settings["vllm_config"]
    if (found := (config.get("weight_transfer_config") or {}).get("backend")) != backend:
        return (
            f"has the weight transfer backend {found}, expected {backend}; "
            f'start it with --weight-transfer-config \'{{"backend": "{backend}"}}\''
        )
    if (found := config["model_config"]["logprobs_mode"]) != "processed_logprobs":
        return f"has the logprobs mode {found}; start it with --logprobs-mode processed_logprobs"
    if (found := config["model_config"]["max_model_len"]) < max_tokens:
        return f"takes {found} tokens, expected {max_tokens} of prompt and response; raise its --max-model-len"
    return None

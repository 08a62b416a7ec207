"""One rank's requests to all live servers, until each is answered or its server has failed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from megatron_ext import heartbeat
from megatron_ext.rollout.base import IsNeeded, Request, Sampling
from megatron_ext.rollout.vllm.common import finished_sample, sampling_parameters
from megatron_ext.rollout.vllm_server.http_api import RequestRefused, ServerFault, ask, new_session
from megatron_ext.rollout.vllm_server.reply import max_bytes, read_reply
from megatron_ext.types import Sample

HEALTH_S = 10.0  # between two looks at a server's health, and for an answer to one
GIVE_UP_S = 0.5  # between two looks at what is needed no longer
HEALTH_POLLS = 3  # so many unanswered in a row: the server hangs


class Stale(ServerFault):
    """The server generated with other weights than the current ones."""


@dataclass
class RoundResult:
    """What a round has shown of the servers, by url, and how many requests they left unanswered."""

    faults: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)
    refused: str | None = None  # a request that no server takes
    num_failed: int = 0
    num_stale: int = 0

    def note(self, url: str, error: Exception, *, lost: int) -> None:
        """``error`` ended ``lost`` requests to the server."""
        if isinstance(error, RequestRefused):
            self.refused = str(error)
        elif isinstance(error, Stale):
            self.stale[url] = str(error)
            self.num_stale += lost
        else:
            self.faults[url] = str(error)
            self.num_failed += lost


@dataclass(frozen=True)
class Round:
    """``servers``: url -> token. ``slots``: requests of this rank that one server has at a time. ``version``: the label
    that answers must have (None: any, the servers still have the weights they started with)."""

    servers: Mapping[str, str]
    version: str | None
    slots: int
    deadline_s: float
    tokenizer: Any
    eos: list[int]
    vocab_size: int

    async def run(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        take: Callable[[int, Sample], None],
        is_needed: IsNeeded = lambda number: True,
    ) -> RoundResult:
        """Give every answered request's number and sample to ``take``. Servers draw from one queue, front to back, so
        that the responses to one prompt mostly share a server and its cache of the prompt. A request that is needed no
        longer is not made, or its connection is closed, which ends it on the server."""
        outcome, queue = RoundResult(), deque(range(len(requests)))
        running: dict[int, asyncio.Task[Sample]] = {}
        given_up: set[int] = set()
        slots = min(self.slots, -(-len(requests) // len(self.servers)))
        # no connection is used twice: one that the server is just closing would look like a failed server
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with new_session(connector=connector) as session:

            async def work(url: str) -> None:
                while queue:
                    number = queue.popleft()
                    if not is_needed(number):
                        continue
                    asked[url] += 1
                    running[number] = asyncio.create_task(self._sample(session, url, requests[number], sampling))
                    try:
                        take(number, await running[number])
                    except asyncio.CancelledError:
                        own = asyncio.current_task()
                        if number not in given_up or (own is not None and own.cancelling()):
                            raise
                    finally:
                        del running[number]
                    asked[url] -= 1

            async def give_up() -> None:
                while True:
                    await asyncio.sleep(GIVE_UP_S)
                    for number, task in running.items():
                        if not is_needed(number):
                            given_up.add(number)
                            task.cancel()

            async def serve(url: str) -> None:
                try:
                    async with asyncio.TaskGroup() as group:
                        watchdog = group.create_task(self._watch(session, url))
                        await asyncio.wait([group.create_task(work(url)) for _ in range(slots)])
                        watchdog.cancel()
                except* (ServerFault, RequestRefused) as errors:
                    outcome.note(url, errors.exceptions[0], lost=asked[url])
                    if outcome.refused is not None:
                        queue.clear()

            asked = dict.fromkeys(self.servers, 0)
            giving_up = asyncio.create_task(give_up())
            await asyncio.gather(*(serve(url) for url in self.servers))
            giving_up.cancel()
        return outcome

    async def _sample(self, session: aiohttp.ClientSession, url: str, request: Request, sampling: Sampling) -> Sample:
        parameters = sampling_parameters(request, sampling, self.eos)
        body = {"token_ids": list(request.prompt_ids), "sampling_params": parameters}
        reply = await ask(
            session,
            f"{url}/inference/v1/generate",
            token=self.servers[url],
            body=body,
            deadline_s=self.deadline_s,
            max_bytes=max_bytes(sampling.max_response_tokens, sampling.top_k),
        )
        try:
            choice = read_reply(reply, vocab_size=self.vocab_size, max_tokens=sampling.max_response_tokens)
        except ValueError as error:
            raise ServerFault(f"{url}: {error}") from None
        labels = choice.versions
        if self.version is not None and set(labels) != {self.version}:
            raise Stale(f"{url}: generates with weights of version {', '.join(labels)}, expected {self.version}")
        return finished_sample(
            request,
            self.tokenizer,
            response=choice.token_ids,
            logprobs=choice.token_logprobs,
            finish_reason=choice.finish_reason,
            versions=labels,
            mask=choice.sampling_mask,
        )

    async def _watch(self, session: aiohttp.ClientSession, url: str) -> None:
        unanswered = 0
        while True:
            await asyncio.sleep(HEALTH_S)
            try:
                await ask(session, f"{url}/health", token=self.servers[url], get=True, deadline_s=HEALTH_S)
                unanswered = 0
                heartbeat.progress()  # of the server: a response has a deadline of its own
            except ServerFault as fault:
                unanswered += 1
                if unanswered == HEALTH_POLLS:
                    raise ServerFault(f"{url}: did not answer {HEALTH_POLLS} looks at its health: {fault}") from None

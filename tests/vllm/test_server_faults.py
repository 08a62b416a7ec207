"""What can be wrong with servers, shown with small stand-ins for them: nothing here starts vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from megatron_ext.rollout import server_round
from megatron_ext.rollout.base import Request, RolloutError, Sampling
from megatron_ext.rollout.server_round import Outcome, Round
from megatron_ext.rollout.servers import Fleet, ServerProcess
from megatron_ext.rollout.vllm_server import ServerEngine

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
SAMPLING = Sampling(1.0, 1.0, 4)
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
def server(generate: Handler | None, answers: dict[str, Any]) -> Iterator[str]:
    """A server that gives fixed answers, and responses made by ``generate``; its url."""
    app = web.Application()
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


def ask(urls: list[str], count: int, deadline_s: float = 20.0) -> tuple[Outcome, dict[int, Any]]:
    got: dict[int, Any] = {}
    one = Round(urls, "3", 2, deadline_s, Tokenizer(), [1])
    return asyncio.run(one.run([Request((5, 6), i) for i in range(count)], SAMPLING, got.__setitem__)), got


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


def edited(path: str, **changes: Any) -> dict[str, Any]:
    config = RUNNING["/server_info"]["vllm_config"]
    return RUNNING | {path: {"vllm_config": config | changes} if path == "/server_info" else changes}


@pytest.mark.parametrize(
    ("generate", "answers", "message"),
    [
        (answering(), {}, "is no vLLM server"),
        (answering(), edited("/version", version="0.25.1"), "vLLM 0.25.1, expected 0.26 or newer"),
        (answering(), {"/version": RUNNING["/version"]}, "VLLM_SERVER_DEV_MODE=1"),
        (None, RUNNING, "--enable-scale-out"),
        (
            answering(),
            edited("/server_info", weight_transfer_config={"backend": "ipc"}),
            "backend ipc, expected inline",
        ),
        (
            answering(),
            edited("/server_info", model_config={"logprobs_mode": "raw_logprobs", "max_model_len": 4096}),
            "--logprobs-mode processed_logprobs",
        ),
        (
            answering(),
            edited("/server_info", model_config={"logprobs_mode": "processed_logprobs", "max_model_len": 32}),
            "takes 32 tokens, expected 64",
        ),
    ],
)
def test_servers_that_cannot_be_driven(
    generate: Handler | None, answers: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with server(generate, answers) as url, pytest.raises(ValueError, match=message) as error:
        ServerEngine(BASE, dtype="float32", max_tokens=64, log_dir=tmp_path, urls=[url])
    assert url in str(error.value)


def test_nobody_answers_at_the_url(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{url} does not answer.*start it first"):
            ServerEngine(BASE, dtype="float32", max_tokens=64, log_dir=tmp_path, urls=[url])


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"rollout.servers.port: .*127.0.0.1:{port} .*in use"):
            ServerEngine(BASE, dtype="float32", max_tokens=64, log_dir=tmp_path, num=2, port=port - 1)
    assert not list(tmp_path.iterdir())  # nothing was started


def process(tmp_path: Path, code: str) -> ServerProcess:
    return ServerProcess("http://127.0.0.1:9", [sys.executable, "-c", code], {}, tmp_path / "server-0.log")


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    fleet = Fleet([process(tmp_path, "raise SystemExit('no such model')")], [], max_restarts=2)
    with pytest.raises(RolloutError, match=r"did not start: its process ended(.|\n)*no such model"):
        fleet.start()


def test_restarts_are_bounded_also_when_none_succeeds(tmp_path: Path) -> None:
    fleet = Fleet([process(tmp_path, "raise SystemExit('out of memory')")], [], max_restarts=2)
    with pytest.raises(RolloutError, match=r"after 2 restarts, .*allows 2(.|\n)*out of memory"):
        fleet.repair({"http://127.0.0.1:9": "hangs"})
    assert fleet.processes["http://127.0.0.1:9"].log_file.read_text().count("out of memory") == 2


def test_others_servers_are_left_out_until_none_is_left() -> None:
    fleet = Fleet([], ["http://a", "http://b"], max_restarts=0)
    fleet.repair({"http://a": "hangs"})
    assert fleet.urls == ["http://b"]
    with pytest.raises(RolloutError, match="no server .* is left.*broken"):
        fleet.repair({"http://b": "broken"})


@pytest.mark.parametrize("deaf", [False, True])
def test_a_killed_trainer_leaves_no_server_behind(deaf: bool, tmp_path: Path) -> None:
    """Neither a server nor its workers: one in order on SIGTERM, one that does not listen to it and is killed."""
    tree = "import subprocess, sys, signal, time\n" + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" * deaf
    tree += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\nprint('up', flush=True)\n"
    tree += "time.sleep(1000)"
    trainer = f"""
import os, pathlib, signal, time
from megatron_ext.rollout import servers
servers.GRACE_S = 0.5
log = pathlib.Path({str(tmp_path)!r}) / "log"
process = servers.ServerProcess("", [{sys.executable!r}, "-c", {tree!r}], {{}}, log)
process.start()
while "up" not in log.read_text():
    time.sleep(0.02)
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", trainer], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    group, end = int(done.stdout), time.monotonic() + 15
    while (left := members(group)) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        os.killpg(group, signal.SIGKILL)
    assert not left


def members(group: int) -> list[int]:
    """The processes of a process group that are not dead."""
    found = []
    for each in psutil.process_iter(["status"]):
        try:
            if os.getpgid(each.pid) == group and each.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(each.pid)
        except ProcessLookupError:
            continue
    return found

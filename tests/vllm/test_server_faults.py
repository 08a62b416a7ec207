"""What can be wrong with servers, shown with small stand-ins for them: nothing here starts vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from megatron_ext.rollout.base import Request, RolloutError, Sampling
from megatron_ext.rollout.vllm_server import engine as vllm_server
from megatron_ext.rollout.vllm_server import round as server_round
from megatron_ext.rollout.vllm_server.engine import ServerEngine
from megatron_ext.rollout.vllm_server.fleet import Fleet, ServerProcess
from megatron_ext.rollout.vllm_server.guard import PROOF, TOKEN_VARIABLE, answer_key, request_key
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


def edited(path: str, **changes: Any) -> dict[str, Any]:
    config = RUNNING["/server_info"]["vllm_config"]
    return RUNNING | {path: {"vllm_config": config | changes} if path == "/server_info" else changes}


@pytest.mark.parametrize(
    ("generate", "answers", "message"),
    [
        (answering(), {"/version": {}}, "is no vLLM server"),
        (answering(), edited("/version", version="what?"), "is vLLM what?"),
        (answering(), RUNNING | {"/server_info": {}}, "/server_info lacks what is needed"),
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
    generate: Handler | None, answers: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with server(generate, answers) as url, pytest.raises(ValueError, match=message) as error:
        ServerEngine(BASE, dtype="float32", max_tokens=64, log_dir=tmp_path, urls=[url])
    assert url in str(error.value)


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "answers everybody; start it with --middleware"), ("f" * 16, "started with another token")],
)
def test_servers_without_the_runs_token(
    token: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_tokens": 64, "log_dir": tmp_path, "token_variable": "OURS"}
    with server(answering(), RUNNING, token) as url:
        with pytest.raises(ValueError, match="rollout.servers.token_variable: the environment's OURS holds 0 char"):
            ServerEngine(BASE, urls=[url], **options)
        monkeypatch.setenv("OURS", TOKEN)
        with pytest.raises(ValueError, match=f"rollout.servers.urls: {url} .*{message}"):
            ServerEngine(BASE, urls=[url], **options)


def test_nobody_answers_at_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
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
    fleet = Fleet([process(tmp_path, "raise SystemExit('no such model')")], {}, max_restarts=2)
    with pytest.raises(RolloutError, match=r"did not start: its process ended(.|\n)*no such model"):
        fleet.start()


def test_restarts_are_bounded_also_when_none_succeeds(tmp_path: Path) -> None:
    fleet = Fleet([process(tmp_path, "raise SystemExit('out of memory')")], {}, max_restarts=2)
    with pytest.raises(RolloutError, match=r"after 2 restarts, .*allows 2(.|\n)*out of memory"):
        fleet.repair({"http://127.0.0.1:9": "hangs"})
    assert fleet.processes["http://127.0.0.1:9"].log_file.read_text().count("out of memory") == 2


def test_others_servers_are_left_out_until_none_is_left() -> None:
    fleet = Fleet([], {"http://a": TOKEN, "http://b": TOKEN}, max_restarts=0)
    fleet.repair({"http://a": "hangs"})
    assert fleet.servers == {"http://b": TOKEN}
    with pytest.raises(RolloutError, match="no server .* is left.*broken"):
        fleet.repair({"http://b": "broken"})


def test_a_server_that_was_left_out_is_in_the_next_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with other weights may have been started anew: it knows nothing of the transfer that the others are in."""
    engine: Any = ServerEngine.__new__(ServerEngine)
    engine.rank, engine.world, engine.distributed, engine.transfer = 0, 1, False, object()
    engine.fleet, engine.left_out, engine.is_connected = (
        Fleet([], {"http://a": "", "http://b": ""}, max_restarts=0),
        {},
        True,
    )
    engine.servers, sent = engine.fleet.servers, []

    def send(*, reconnect: bool) -> dict[str, str]:
        sent.append((reconnect, set(engine.servers)))
        return {}

    monkeypatch.setattr(engine, "_send", send)
    engine.update_weights(object(), 3)
    engine._leave_out({}, {"http://a": "generates with weights of version 0"})
    assert set(engine.servers) == {"http://b"}
    for version in (4, 5):
        engine.update_weights(object(), version)
    both = {"http://a", "http://b"}
    assert sent == [(False, both), (True, both), (False, both)]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_killed_trainer_leaves_no_server_behind(deaf: bool, tmp_path: Path) -> None:
    """Neither a server nor its workers: one in order on SIGTERM, one that does not listen to it and is killed."""
    tree = "import subprocess, sys, signal, time\n" + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" * deaf
    tree += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\nprint('up', flush=True)\n"
    tree += "time.sleep(1000)"
    trainer = f"""
import os, pathlib, signal, time
from megatron_ext.rollout.vllm_server import fleet
fleet.GRACE_S = 0.5
log = pathlib.Path({str(tmp_path)!r}) / "log"
process = fleet.ServerProcess("", [{sys.executable!r}, "-c", {tree!r}], {{}}, log)
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

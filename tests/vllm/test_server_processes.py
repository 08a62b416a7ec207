"""Servers that cannot be driven, do not start, or outlive their trainer; nothing here starts vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ext.rollout.base import RolloutError
from megatron_ext.rollout.vllm_server.engine import ServerEngine
from megatron_ext.rollout.vllm_server.fleet import Fleet, ServerProcess
from megatron_ext.rollout.vllm_server.guard import TOKEN_VARIABLE
from tests.vllm.stand_in import BASE, RUNNING, TOKEN, Handler, answering, server


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

"""Servers of the real vLLM on CPU: weights, versions and faults, against transformers on the same weights."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from megatron_ext.rollout.base import Request, RolloutError, Sampling
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.vllm import weight_transfer
from megatron_ext.rollout.vllm_server import guard
from megatron_ext.rollout.vllm_server import round as server_round
from megatron_ext.rollout.vllm_server.engine import ServerEngine
from megatron_ext.rollout.vllm_server.fleet import serve_command
from megatron_ext.rollout.vllm_server.round import Round
from megatron_ext.rollout.vllm_server.weights import Servers, Source, connect
from megatron_ext.types import Sample
from tests import gloo

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
GREEDY = Sampling(0.0, 1.0, 16)
MAX_TOKENS = 256


class Frozen:
    """Weights that stay what they are (rollout/base.py::Weights)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.closed = tensors, False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, value.dtype, tuple(value.shape)) for name, value in self]


class Truth:
    """transformers on the tiny model, and the weights of versions of it."""

    def __init__(self) -> None:
        self.engine = HFEngine(BASE)
        self.base = {name: value.detach().clone() for name, value in self.engine.model.named_parameters()}

    def weights(self, version: int) -> Frozen:
        draw = torch.Generator().manual_seed(version)
        return Frozen(
            {
                name: value + 0.1 * value.std() * torch.randn(value.shape, generator=draw)
                for name, value in self.base.items()
            }
        )

    def check(self, samples: list[Sample], version: int, sampling: Sampling = GREEDY) -> None:
        """Tokens, log-probs and labels are those of the version's weights."""
        self.engine.update_weights(self.weights(version), version)
        requests = [Request(sample.prompt_ids, 0) for sample in samples]
        for found, expected in zip(samples, self.engine.generate(requests, sampling), strict=True):
            assert (found.response_ids, found.text, found.truncated, found.weight_version) == (
                expected.response_ids,
                expected.text,
                expected.truncated,
                version,
            )
            torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)


def requests(count: int, seed: int = 5) -> list[Request]:
    draw = random.Random(seed)
    return [Request(tuple(draw.randrange(2, 60) for _ in range(draw.randint(1, 30))), i) for i in range(count)]


def new_engine(log_dir: Path, **options: Any) -> ServerEngine:
    common: dict[str, Any] = {"dtype": "float32", "max_tokens": MAX_TOKENS, "batch_size": 64, "enforce_eager": True}
    return ServerEngine(BASE, log_dir=log_dir, **(common | options))


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerEngine]:
    engine = new_engine(
        tmp_path_factory.mktemp("servers"), num=2, port=free_ports_from(), deadline_s=60, max_restarts=2
    )
    groups = [process.pid for process in engine.fleet.processes.values()]
    yield engine
    groups += [process.pid for process in engine.fleet.processes.values() if process.alive()]
    engine.close()
    assert not [pid for pid in groups if members(pid)]


def free_ports_from() -> int:
    """The first of two neighbouring ports that nobody listens at."""
    for port in range(20000 + os.getpid() % 5000, 60000, 2):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no free ports")


def members(group: int) -> list[int]:
    """The processes of a process group that are not dead."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def push(servers: dict[str, str], weights: Frozen, version: str) -> dict[str, str]:
    """Weights to servers as the trainer sends them, behind its back; the faults."""
    client = Servers(20)
    source = Source(lambda: None, client.checksum)
    source.weights = weights
    client.begin(servers, version)
    connect(client, source, rank=0, address="", on_chief=lambda run: run()).send_weights()
    return client.end()


def spoil(url: str, token: str, weights: Frozen) -> None:
    """Other weights, labelled as the ones the server started with."""
    assert not push({url: token}, weights, "default")


def test_a_server_is_told_to_trust_no_code() -> None:
    """As vLLM's own parser reads the command."""
    command = serve_command(BASE, host="127.0.0.1", port=1, backend=weight_transfer.INLINE, options={})
    assert "--no-trust-remote-code" in command
    parser = make_arg_parser(FlexibleArgumentParser())
    assert parser.parse_args(command[command.index("--model") :]).trust_remote_code is False


def test_every_update_reaches_all_servers(engine: ServerEngine, truth: Truth) -> None:
    prompts = requests(13)
    for version in (1, 2, 3):
        engine.update_weights(truth.weights(version), version)
        finished: dict[int, Sample] = {}
        samples = engine.generate(prompts, GREEDY, finished.update)
        truth.check(samples, version)
        assert [sample.prompt_ids for sample in samples] == [request.prompt_ids for request in prompts]
        assert finished == dict(enumerate(samples))
    for each in engine.servers.items():  # not one server alone
        one = Round(dict([each]), "3", 64, 60, engine.tokenizer, engine.eos, engine.vocab_size)
        got: dict[int, Sample] = {}
        asyncio.run(one.run(prompts, GREEDY, got.__setitem__))
        truth.check([got[number] for number in range(len(prompts))], 3)


def test_logprobs_are_those_of_the_nucleus_and_a_seed_fixes_its_response(engine: ServerEngine, truth: Truth) -> None:
    engine.update_weights(truth.weights(4), 4)
    sampling, prompts = Sampling(0.8, 0.7, 16), requests(8)
    samples = engine.generate(prompts, sampling)
    again = engine.generate(prompts[::-1], sampling)[::-1]
    assert [sample.response_ids for sample in again] == [sample.response_ids for sample in samples]
    truth.engine.update_weights(truth.weights(4), 4)
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            scores = truth.engine.model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / sampling.temperature
        for at, token, found in zip(scores.double().softmax(-1), sample.response_ids, sample.logprobs, strict=True):
            order = at.sort(descending=True)
            kept = order.indices[: int((order.values.cumsum(0) < sampling.top_p).sum()) + 1]
            assert token in kept
            assert abs((at[token] / at[kept].sum()).log().item() - found) < 1e-4


def test_old_weights_are_noticed_and_replaced(engine: ServerEngine, truth: Truth) -> None:
    engine.update_weights(truth.weights(5), 5)
    stale, restarts = engine.num_stale, engine.num_restarts
    spoil(*list(engine.servers.items())[1], truth.weights(99))
    truth.check(engine.generate(requests(13), GREEDY), 5)
    assert engine.num_stale > stale and engine.num_restarts == restarts
    assert engine.metrics()["servers/stale"] == engine.num_stale


def two_ranks(rank: int, world: int, url: str, token: str, log_dir: Path, weights: list[Frozen]) -> Any:
    os.environ[guard.TOKEN_VARIABLE] = token if rank == 0 else ""
    engine = new_engine(log_dir, urls=[url], deadline_s=60)
    engine.update_weights(weights[0], 6)
    if rank == 0:
        spoil(url, token, weights[1])
    samples = engine.generate(requests(5, seed=rank), GREEDY)
    engine.close()
    return samples, engine.metrics()


def test_two_ranks_share_a_server_that_runs_already(engine: ServerEngine, truth: Truth, tmp_path: Path) -> None:
    weights = [truth.weights(6), truth.weights(99)]
    found = gloo.run(two_ranks, 2, *next(iter(engine.servers.items())), tmp_path, weights)
    for samples, _ in found:
        truth.check(samples, 6)
    assert found[0][1] == found[1][1]
    assert found[0][1]["servers/stale"] > 0


VLLMS = (  # method, path, body: what did harm, and what can be read
    ("POST", "/collective_rpc", {"method": "profile", "args": [True, "x"]}),
    ("POST", "/update_weight_version", {"new_version": "5"}),
    ("POST", "/weight_checker", {"action": "reset"}),
    ("POST", "/abort_requests", {}),
    ("POST", "/reset_prefix_cache", None),
    ("POST", "/sleep", None),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
    ("GET", "/v1/models", None),
)
OURS = (
    ("POST", "/pause?mode=abort", None),
    ("POST", "/start_weight_update", None),
    ("POST", "/update_weights", {"update_info": {"names": [], "dtype_names": [], "shapes": []}}),
    ("POST", "/finish_weight_update", {"weight_version": "5"}),
    ("POST", "/inference/v1/generate", {"token_ids": [1], "sampling_params": {"max_tokens": 1}}),
    ("GET", "/server_info?config_format=json", None),
    ("GET", "/health", None),
    ("GET", "/version", None),
)


def status_of(url: str, method: str, path: str, body: Any, authorization: str | None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    data = json.dumps(body).encode() if method == "POST" else None
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def stranger(url: str, pids: list[int], sockets: list[str], answers: Connection) -> None:
    """Another user of this machine (only root can become one)."""
    another = os.geteuid() == 0
    if another:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    wrong = (None, "Bearer ", "Bearer " + "0" * 64, "Basic eDp5", "Bearer \xe9")
    found: list[str] = []
    for authorization in wrong:
        for method, path, body in (*VLLMS, *OURS):
            if (answer := status_of(url, method, path, body, authorization)) != (401, b""):
                found.append(f"{authorization} {method} {path}: {answer}")
    if another:  # else it is the server's own user, who may read these
        for path in (*(f"/proc/{pid}/environ" for pid in pids), *sockets):
            try:
                if path.startswith("/proc"):
                    Path(path).read_bytes()
                else:
                    socket.socket(socket.AF_UNIX).connect(path)
                found.append(f"{path} is open")
            except PermissionError:
                continue
    answers.send(found)


def test_another_user_can_do_nothing_with_a_server(engine: ServerEngine, truth: Truth) -> None:
    engine.update_weights(truth.weights(9), 9)
    url, token = next(iter(engine.servers.items()))
    pids = members(engine.fleet.processes[url].pid)
    assert not [pid for pid in pids if token in " ".join(psutil.Process(pid).cmdline())]
    listening = [each for each in psutil.net_connections("inet") if each.pid in pids and each.status == "LISTEN"]
    assert listening and {each.laddr[0] for each in listening if each.laddr} == {"127.0.0.1"}
    sockets = [str(each.laddr) for each in psutil.net_connections("unix") if each.pid in pids and each.laddr]
    assert sockets
    ours, theirs = Pipe()
    child = get_context("fork").Process(target=stranger, args=(url, pids, sockets, theirs))
    child.start()
    assert ours.recv() == []
    child.join()
    for method, path, body in VLLMS:  # not even with the token
        assert status_of(url, method, path, body, guard.request_key(token)) == (404, b"")
    status, info = status_of(url, *OURS[5], guard.request_key(token))
    assert status == 200 and token.encode() not in info
    restarts = engine.num_restarts
    truth.check(engine.generate(requests(4), GREEDY), 9)
    assert engine.num_restarts == restarts and engine.num_stale == engine.metrics()["servers/stale"]


def test_weights_that_do_not_arrive_as_they_were_sent_are_not_used(
    engine: ServerEngine, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one tensor differs, or the stream is not confirmed: such a server is replaced, with a new token."""
    engine.update_weights(truth.weights(10), 10)
    encoded, update = weight_transfer._encoded, Servers.update_weights
    numbers = iter(range(1000))

    def flipped(value: Tensor) -> str:
        if next(numbers) == 3:
            value = value.clone()
            value.view(torch.int32).view(-1)[7] ^= 1
        return encoded(value)

    first, second = (dict([each]) for each in engine.servers.items())
    with monkeypatch.context() as patch:
        patch.setattr(weight_transfer, "_encoded", flipped)
        assert "received checksum" in push(first, truth.weights(11), "11")[next(iter(first))]
    with monkeypatch.context() as patch:
        patch.setattr(Servers, "update_weights", lambda self, info: "checksum" in info or update(self, info))
        assert "has not confirmed" in push(second, truth.weights(11), "11")[next(iter(second))]
    engine.fleet.max_restarts = engine.num_restarts + 2
    engine.update_weights(truth.weights(12), 12)
    assert engine.num_restarts == engine.fleet.max_restarts
    assert set(engine.servers) == {*first, *second} and not set(engine.servers.values()) & {
        *first.values(),
        *second.values(),
    }
    truth.check(engine.generate(requests(5), GREEDY), 12)


def test_a_killed_and_a_hanging_server_are_replaced(
    engine: ServerEngine, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.update_weights(truth.weights(7), 7)
    restarts, failed = engine.num_restarts, engine.num_failed
    monkeypatch.setattr(server_round, "HEALTH_S", 0.5)
    killed, hanging = (engine.fleet.processes[url] for url in engine.servers)
    engine.fleet.max_restarts = restarts + 2
    finished: list[int] = []

    def strike(done: Mapping[int, Sample]) -> None:
        if not finished:
            os.killpg(killed.pid, signal.SIGKILL)
            os.killpg(hanging.pid, signal.SIGSTOP)
        finished.extend(done)

    given_up: list[float] = []
    repair = engine.fleet.repair

    def timed(faults: dict[str, str]) -> None:
        given_up.append(time.monotonic())
        repair(faults)

    monkeypatch.setattr(engine.fleet, "repair", timed)
    prompts, start = requests(60), time.monotonic()
    truth.check(engine.generate(prompts, GREEDY, strike), 7)
    assert given_up[0] - start < 30  # far below the minute that a response may take
    assert engine.num_restarts == restarts + 2
    assert engine.num_failed > failed
    assert sorted(finished) == [*range(60)]  # what was answered before the strike was not asked for again


def test_a_server_that_fails_while_the_policy_trains_is_left_out_until_the_next_update(
    engine: ServerEngine, truth: Truth
) -> None:
    """In a second thread, as beside training: no weights are to be had, so the others generate what it owes."""
    weights = truth.weights(13)
    engine.update_weights(weights, 13)
    weights.closed = True
    killed, restarts = next(iter(engine.servers)), engine.num_restarts
    engine.fleet.max_restarts = restarts + 1

    def strike(done: Mapping[int, Sample]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(engine.fleet.processes[killed].pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as thread:
        samples = thread.submit(engine.generate, requests(60), GREEDY, strike).result()
    truth.check(samples, 13)
    assert list(engine.left_out) == [killed] and killed not in engine.servers and engine.num_restarts == restarts
    engine.update_weights(truth.weights(14), 14)
    assert killed in engine.servers and engine.left_out == {} and engine.num_restarts == restarts + 1
    truth.check(engine.generate(requests(13), GREEDY), 14)


def test_with_no_server_left_while_the_policy_trains_the_run_stops(engine: ServerEngine, truth: Truth) -> None:
    weights = truth.weights(15)
    engine.update_weights(weights, 15)
    weights.closed = True
    for url in engine.servers:
        os.killpg(engine.fleet.processes[url].pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="no server is left that has the weights of version 15"):
        engine.generate(requests(4), GREEDY)
    engine.fleet.max_restarts = engine.num_restarts + 2
    engine.update_weights(truth.weights(16), 16)
    truth.check(engine.generate(requests(4), GREEDY), 16)


def test_no_restart_is_left(engine: ServerEngine, truth: Truth) -> None:
    engine.update_weights(truth.weights(8), 8)
    engine.fleet.max_restarts = engine.num_restarts
    process = engine.fleet.processes[next(iter(engine.servers))]
    os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match=rf"max_restarts allows {engine.num_restarts}(.|\n)*{process.log_file.name}"):
        engine.generate(requests(4), GREEDY)

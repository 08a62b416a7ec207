"""What the stream of weights to vLLM's servers waits for, and where the servers run."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.rollout.vllm_server import engine as server_engine
from megatron_ext.rollout.vllm_server import weights
from megatron_ext.rollout.vllm_server.engine import ServerEngine
from megatron_ext.rollout.vllm_server.fleet import ServerProcess


def test_the_first_tensor_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads on a stream of its own, which waits for no optimizer step."""
    done: list[str] = []

    def gathered() -> Any:
        done.append("read")
        yield "a", torch.zeros(2)

    monkeypatch.setattr(weights.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(weights.torch.cuda, "synchronize", lambda: done.append("wait"))
    source: Any = weights.Source(lambda: done.append("barrier"), None)
    source.weights = gathered()
    assert [name for name, _ in source] == ["a"]
    assert done == ["wait", "read", "wait", "barrier"]


@pytest.mark.parametrize(("dead", "connected"), [([], 0), (["http://b"], 1)])
def test_a_group_that_has_lost_a_server_is_left(
    monkeypatch: pytest.MonkeyPatch, dead: list[str], connected: int
) -> None:
    """NCCL would wait for the dead one as long as the run lasts."""
    engine: Any = ServerEngine.__new__(ServerEngine)
    sent: list[int] = []
    old, new = (SimpleNamespace(send_weights=lambda n=n: sent.append(n), shutdown=lambda: None) for n in (0, 1))
    client: Any = SimpleNamespace(faults={}, shutdown_weight_transfer_engine=lambda: None)
    client.begin = lambda servers, version: client.faults.update(dict.fromkeys(dead, "does not answer"))
    client.end = lambda: client.faults
    engine.rank, engine.world, engine.distributed, engine.version, engine.address = 0, 1, False, 3, ""
    engine.weights, engine.source, engine.transfer, engine.client = object(), SimpleNamespace(), old, client
    engine.servers = {"http://a": "", "http://b": ""}
    monkeypatch.setattr(server_engine, "connect", lambda *_, **__: new)
    assert set(engine._send(reconnect=False)) == set(dead)
    assert sent == [connected]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_server_runs_where_the_launcher_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is bound to the processors near its own GPU; a server's is another."""
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.environ.get('OMP_NUM_THREADS'))"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    log, allowed = tmp_path / "log", os.sched_getaffinity(0)
    if (rank := os.fork()) == 0:
        os.sched_setaffinity(0, [min(allowed)])
        ServerProcess("", [sys.executable, "-c", code], {}, log).start()
        time.sleep(60)
        os._exit(0)
    try:
        end = time.monotonic() + 50
        while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        os.kill(rank, 9)
        os.waitpid(rank, 0)
    assert log.read_text() == f"{sorted(allowed)} None\n"

"""The slots of ranks as their launcher reads them while ranks write."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from megatron_ext import heartbeat

ROOT = Path(__file__).parents[1]
WRITER = """
from megatron_ext import heartbeat
heartbeat.begin(60.0)
while True:
    heartbeat.enter("update", step=3)
    heartbeat.progress()
    heartbeat.enter("rollout", step=3)
"""


def test_a_reader_never_sees_a_half_written_place() -> None:
    """A deadline that is 0 for an instant would end a healthy run."""
    with tempfile.TemporaryFile() as beats, tempfile.TemporaryFile() as stacks:
        slots = heartbeat.Slots(beats, 1)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LOCAL_RANK": "0",
            heartbeat.SLOTS: str(beats.fileno()),
            heartbeat.STACKS: str(stacks.fileno()),
        }
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER], env=environment, pass_fds=(beats.fileno(), stacks.fileno())
        )
        try:
            deadline = time.monotonic() + 60
            while slots.read(0).step != 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            seen = {(p.step, p.phase, p.silence_s, p.deadline_s) for p in (slots.read(0) for _ in range(300_000))}
        finally:
            writer.kill()
            writer.wait()
    place = (heartbeat.SILENCE_S, 60)
    assert {("update", *place), ("rollout", *place)} <= {each[1:] for each in seen}
    assert seen <= {(3, "update", *place), (3, "rollout", *place)}, seen


def test_who_waits_for_a_thread_that_waits_for_other_ranks_waits_for_them() -> None:
    """Also where that thread waits for another one, which does."""
    lock = threading.Lock()
    lock.acquire()
    code = compile("lock.acquire()", os.path.join("torch", "distributed", "as_if.py"), "exec")
    far = threading.Thread(target=exec, args=(code, {"lock": lock}), daemon=True)
    far.start()

    def wait() -> None:
        with heartbeat.waiting_for(far):
            far.join()

    near, here = threading.Thread(target=wait, daemon=True), threading.get_ident()
    near.start()
    deadline = time.monotonic() + 60
    with heartbeat.waiting_for(near):
        while not heartbeat._waits(here) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat._waits(here)
    assert not heartbeat._waits(here)
    lock.release()
    near.join()
    with heartbeat.waiting_for(near):
        assert not heartbeat._waits(here)  # it has ended

"""The slots of ranks as their launcher reads them while ranks write."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
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

"""Runs a function of inside.py in a process that has Transformer Engine's sources."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.transformer_engine import source

ROOT = Path(__file__).parents[2]


def inside(function: str, *, world: int = 1, **options: Any) -> list[Any]:
    """What the function returns on each rank. Without the sources the test is skipped, or fails where CI is set."""
    if not source.available():
        message = (
            f"Transformer Engine {source.VERSION} is not in {source.SOURCE}: make build/transformer-engine/.fetched"
        )
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    command = [
        sys.executable,
        "-m",
        "tests.transformer_engine.inside",
        function,
        json.dumps({"world": world, **options}),
    ]
    done = warm.run(command, cwd=ROOT, env=os.environ | source.ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""Workers that score are started here as the product does, and not forked as for all other tests."""

from __future__ import annotations

import subprocess

import pytest

from megatron_ext.rollout.rewards import worker_pool


@pytest.fixture(autouse=True)
def fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "subprocess", subprocess)

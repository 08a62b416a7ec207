"""Every test draws the same numbers, in every run and in every order; and what many tests start is started cheaply."""

from __future__ import annotations

import gc
import os
import random
from importlib.util import find_spec

import pytest
import torch

from tests import order, rendering, warm

if find_spec("vllm") is None:  # whose threads are not to be forked
    rendering.fork()
    warm.start_verifiers_warm()
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and what it starts: threads that wait for one burn it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = order.longest_first(items)


def pytest_collection_finish() -> None:
    """What is imported is nobody's garbage: Megatron-Core collects at every save, in forks that would copy it all."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the generators that a test draws from without a seed of its own."""
    random.seed(0)
    torch.manual_seed(0)

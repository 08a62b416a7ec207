"""Every test draws the same numbers, in every run and in every order; and what many tests start is started cheaply."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from tests import order, rendering, warm

if find_spec("vllm") is None:  # its threads are not to be forked
    rendering.fork()
warm.start_verifiers_warm()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = order.longest_first(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the generators that a test draws from without a seed of its own."""
    random.seed(0)
    torch.manual_seed(0)

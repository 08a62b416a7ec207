"""Runs that these tests start may write no metric that the glossary does not describe."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_ext.metrics.writer import STRICT


@pytest.fixture(scope="module", autouse=True)
def every_metric_is_described() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STRICT, "1")  # processes inherit it
        yield

"""A random Qwen3-MoE with the tiny base's tokenizer, of 16 experts: as many as a rank holds in earnest."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests import tiny


@functools.cache
def moe_of_16() -> Path:
    return tiny.experts_model(Path(tempfile.mkdtemp(prefix="tiny-")) / "moe", layers=2, experts=16)

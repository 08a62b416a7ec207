"""Transformer Engine's sources, and under them all that inside.py imports: for processes that start warm."""

from __future__ import annotations

from tests.transformer_engine import source

source.load()

import tests.transformer_engine.inside  # noqa: E402, F401

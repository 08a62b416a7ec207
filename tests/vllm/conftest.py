"""These tests drive the real vLLM: ``.venv-vllm/bin/python -m pytest tests/vllm`` (part of ``make test``)."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = ["test_*.py"] if find_spec("vllm") is None else []

"""Qwen2 and Qwen2.5, dense: biases on query, key and value, which config.json does not mention."""

from __future__ import annotations

from megatron_ext.model.architectures.base import Family

QWEN2 = Family("Qwen2ForCausalLM", qkv_bias=True)

"""Qwen3, dense: queries and keys are normalised head by head."""

from __future__ import annotations

from megatron_ext.model.architectures.base import Family

QWEN3 = Family("Qwen3ForCausalLM", qk_norm=True, supported_values={"attention_bias": False})

"""Llama 3.x, dense. From 3.1 on its config.json stretches the rotary frequencies (model/rope.py)."""

from __future__ import annotations

from megatron_ext.model.architectures.base import Family

LLAMA = Family("LlamaForCausalLM", supported_values={"attention_bias": False})

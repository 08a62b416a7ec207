"""A random Qwen3-MoE with the tiny base's tokenizer, of 16 experts: as many as a rank holds in earnest."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


@functools.cache
def moe_of_16() -> Path:
    path = Path(tempfile.mkdtemp(prefix="tiny-")) / "moe"
    shutil.copytree(BASE, path)
    base = json.loads((BASE / "config.json").read_text())
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=base["vocab_size"],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,  # pyright: ignore[reportCallIssue]
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=base["max_position_embeddings"],
        eos_token_id=base["eos_token_id"],
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path

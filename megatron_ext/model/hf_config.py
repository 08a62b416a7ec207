"""Hugging Face ``config.json`` -> Megatron-Core ``TransformerConfig``: dense Qwen2 / Qwen2.5 and Qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_ext import host

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Architecture:
    """What the conversion and the model need of a Hugging Face configuration."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int  # key-value heads
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool  # output layer shares the embedding
    qkv_bias: bool
    qk_norm: bool

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary size after padding to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor) * tensor


def read_architecture(hf: dict[str, Any]) -> Architecture:
    """Raises ValueError for an architecture or a rope type that is not supported."""
    name = (hf.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"config.json: architecture {name} is not supported; expected one of {', '.join(ARCHITECTURES)}"
        )
    rope = hf.get("rope_parameters") or {}
    kind = (hf.get("rope_scaling") or rope).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"config.json: rope type {kind!r} is not supported for {name}; expected 'default'")
    if hf.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window is true; only full attention is supported, set it to false")
    heads = hf["num_attention_heads"]
    return Architecture(
        name=name,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=heads,
        num_groups=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=hf.get("rope_theta") or rope.get("rope_theta", 10000.0),
        max_positions=hf["max_position_embeddings"],
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=name == "Qwen2ForCausalLM" or hf.get("attention_bias", False),
        qk_norm=name == "Qwen3ForCausalLM",
    )


def transformer_config(
    architecture: Architecture, *, tensor: int, pipeline: int, sequence: bool, dtype: torch.dtype
) -> TransformerConfig:
    """The Megatron configuration of the architecture under a layout.

    ``calculate_per_token_loss`` makes Megatron add gradients over micro-batches and data-parallel ranks without
    dividing by their number: the weights of the loss already carry the whole mini-batch's counts.
    """
    a, cuda = architecture, host.device().type == "cuda"
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=a.num_groups,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.ffn_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_eps,
        qk_layernorm=a.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the only one that takes variable lengths
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )

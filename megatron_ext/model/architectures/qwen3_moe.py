"""Qwen3-MoE: Qwen3's attention; a mixture of experts in the layers that config.json does not make dense."""

from __future__ import annotations

from typing import Any

from megatron_ext.model.architectures.base import Experts, Family


def read_experts(hf: dict[str, Any]) -> Experts:
    """Raises ValueError for a router that cannot be trained."""
    num = hf.get("num_experts") or hf.get("num_local_experts")
    if not num:
        raise ValueError("config.json: num_experts missing; take the file of the model's publisher")
    every, only = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    found = Experts(
        num=num,
        top_k=hf["num_experts_per_tok"],
        ffn_size=hf["moe_intermediate_size"],
        renormalise=hf.get("norm_topk_prob", False),
        dense_layers=tuple(i for i in range(hf["num_hidden_layers"]) if i in only or (i + 1) % every),
    )
    if found.top_k > found.num:
        raise ValueError(f"config.json: num_experts_per_tok is {found.top_k}, expected at most num_experts {found.num}")
    if found.top_k == 1 and found.renormalise:
        raise ValueError(
            "config.json: norm_topk_prob with num_experts_per_tok 1 makes every routing weight 1, which no gradient "
            "reaches; set norm_topk_prob to false"
        )
    return found


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    qk_norm=True,
    read_experts=read_experts,
    required_fields=("num_experts_per_tok", "moe_intermediate_size"),
    supported_values={"attention_bias": False},
)

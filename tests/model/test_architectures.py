"""What of a config.json is understood, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.model.architectures import Experts, Llama3Rope, read_architecture
from megatron_ext.model.megatron_config import ModelLayout

MODELS = Path(__file__).parents[2] / "recipes" / "models"


def config(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "config.json").read_text())


def test_the_target_models_are_understood() -> None:
    llama = read_architecture(config("llama-3.1-8b"))
    assert llama.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim, llama.rope_theta) == (False, False, 128, 500000.0)
    moe = read_architecture(config("qwen3-30b-a3b"))
    assert moe.experts == Experts(num=128, top_k=8, ffn_size=768, renormalise=True)
    assert (moe.qk_norm, moe.tied, moe.dtype) == (True, False, "bfloat16")
    qwen = read_architecture(config("qwen2.5-math-7b"))
    assert (qwen.qkv_bias, qwen.qk_norm, qwen.experts, qwen.rope_scaling) == (True, False, None, None)


def test_dense_layers_among_experts_are_counted_as_transformers_does() -> None:
    hf = config("qwen3-30b-a3b") | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    a = read_architecture(hf)
    assert [a.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "qwen3-8b-base",
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel of model_type qwen3 is not",
        ),
        (
            "qwen3-8b-base",
            {"model_type": "mixtral"},
            r"mixtral is not .* one of Qwen2ForCausalLM \(qwen2\), Q",
        ),
        ("qwen3-8b-base", {"model_type": ["qwen3"]}, r"of model_type \['qwen3'\] is not supported"),
        ("qwen3-8b-base", {"attention_bias": True}, "attention_bias is True; only False is supported for Qwen3"),
        ("llama-3.1-8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama-3.1-8b", {"pretraining_tp": 2}, "pretraining_tp is 2; only 1"),
        ("llama-3.1-8b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("qwen2.5-7b", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2.5-7b", {"layer_types": ["full_attention", "sliding_attention"]}, r"holds \['sliding_attention'\]"),
        ("qwen3-8b-base", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ("qwen3-8b-base", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn' is not supported"),
        ("qwen3-8b-base", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "missing low_freq_factor, high_freq"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 1}, "set norm_topk_prob to false"),
        ("qwen3-8b-base", {"architectures": {"a": 1}}, "architecture {'a': 1} of model_type qwen3 is"),
        (
            "qwen3-8b-base",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", "factor": 4}},
            "states 'default' and 'yarn' for rope_type",
        ),
        ("qwen3-8b-base", {"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "'default' and 'yarn' for rope"),
        ("qwen3-8b-base", {"rope_parameters": {"rope_theta": 5e5}}, "1000000.0 and 500000.0 for rope_theta"),
        ("qwen3-8b-base", {"rope_scaling": "llama3"}, "rope_scaling: Input should be"),
        ("llama-3.1-8b", {"original_max_position_embeddings": 4096}, "4096 and 8192 for original_max_position_emb"),
        ("llama-3.1-8b", {"rope_parameters": {"low_freq_factor": 2.0}}, "2.0 and 1.0 for low_freq_factor"),
        ("llama-3.1-8b", {"rope_parameters": {"high_freq_factor": 2.0}}, "2.0 and 4.0 for high_freq_factor"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(config(name) | change)


def test_missing_fields_are_named() -> None:
    hf = config("qwen3-30b-a3b")
    del hf["vocab_size"], hf["moe_intermediate_size"]
    with pytest.raises(ValueError, match="vocab_size, moe_intermediate_size missing"):
        read_architecture(hf)
    hf = config("qwen3-30b-a3b")
    del hf["num_experts"]
    with pytest.raises(ValueError, match="num_experts missing"):
        read_architecture(hf)


def test_stages_that_do_not_hold_all_layers_are_named() -> None:
    assert ModelLayout(pipeline=2, virtual=2).stages(8) == (2, 2, 2, 2)
    assert ModelLayout(pipeline=3, stage_layers=(1, 2, 1)).stages(4) == (1, 2, 1)
    for layout, layers in ((ModelLayout(pipeline=3), 4), (ModelLayout(pipeline=2, stage_layers=(1, 2)), 4)):
        with pytest.raises(ValueError, match=f"need stage_layers with {layout.pipeline} numbers that sum to 4"):
            layout.stages(layers)

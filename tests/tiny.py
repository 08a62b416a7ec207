"""Tiny random models and episodes that tests share."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_ext.types import Episode, Problem, Reward, Sample

VOCAB = 61  # divisible by no tensor-parallel size in use


KINDS: dict[str, tuple] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen3_moe_mixed": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {  # of the wavelengths 6, 20, 63 and 199: one short, two between, one long
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 60,
        }
    },
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "qwen3_moe_mixed": {**EXPERTS, "mlp_only_layers": [2]},
}


@functools.cache
def hf_model(kind: str = "qwen2", tied: bool = False, vocab_size: int = VOCAB) -> tuple[PreTrainedModel, Path]:
    """A random 4-layer model in fp32 and the directory it is saved in."""
    config_class, model_class = KINDS[kind]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=1,
        **OPTIONS.get(kind, {}),
    )
    model = model_class(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    model.save_pretrained(folder)
    return model, folder


def experts_model(
    folder: Path,
    *,
    layers: int,
    experts: int,
    hidden: int = 32,
    expert_width: int = 24,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """``folder``, made with the tiny base's tokenizer and a random Qwen3-MoE: a model that a run can train."""
    base = Path(__file__).parents[1] / "recipes" / "tiny" / "base"
    shutil.copytree(base, folder)
    known = json.loads((base / "config.json").read_text())
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=known["vocab_size"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,  # pyright: ignore[reportCallIssue]
        moe_intermediate_size=expert_width,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=known["max_position_embeddings"],
        eos_token_id=known["eos_token_id"],
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return folder


def episodes(num_prompts: int = 4, num_samples: int = 4, seed: int = 0) -> list[Episode]:
    """Random prompts and responses of 1 to 11 tokens with random 0/1 rewards."""
    draw = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(draw.randint(1, 11)))

    result = []
    for group in range(num_prompts):
        prompt = tokens()
        for _ in range(num_samples):
            response = tokens()
            logprobs = tuple(-draw.random() * 4 for _ in response)
            sample = Sample(prompt, response, logprobs, "", False, 0)
            reward = float(draw.random() < 0.5)
            result.append(Episode(Problem(str(group), "", ""), group, sample, Reward(reward, "correct")))
    return result

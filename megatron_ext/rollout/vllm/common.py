"""What vLLM in this process and vLLM behind HTTP have in common: how a response is asked for and read.

Imports no vllm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import psutil
import torch

from megatron_ext.kept_tokens import KeptTokens
from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.vllm.spec import PREFILL_TOKENS
from megatron_ext.rollout.vllm.version import returns_sampling_masks
from megatron_ext.types import Sample

CACHE_SLACK = 64 * 2**20  # bytes of a CPU's KV cache for blocks that are not full


def model_runner_variable(choice: str) -> dict[str, str]:
    """What tells vLLM which model runner to use: ``v1``, ``v2``, or nothing for ``auto``, its own choice.

    Its own is V2, of Triton kernels, unless it finds no Triton (as its build for CPUs) or a feature that V2 lacks.
    """
    return {} if choice == "auto" else {"VLLM_USE_V2_MODEL_RUNNER": str(int(choice == "v2"))}


def mask_arguments(keeps_support: bool, model_runner: str) -> dict[str, Any]:
    """The engine argument that makes vLLM return the tokens its sampler kept, where it is asked for and vLLM can.

    Only its model runner V2 can, which has no form for CPUs, and only where every request has a top-k.
    """
    is_v2 = torch.cuda.is_available() and model_runner != "v1"
    return {"return_sampling_mask": True} if keeps_support and is_v2 and returns_sampling_masks() else {}


def sampling_parameters(request: Request, sampling: Sampling, eos: list[int]) -> dict[str, Any]:
    """Of vllm.SamplingParams, for one response with the log-probs of its own tokens."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_response_tokens,
        "seed": request.seed,
        "stop_token_ids": eos,
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def finished_sample(
    request: Request,
    tokenizer: Any,
    *,
    response: Sequence[int],
    logprobs: Iterable[float],
    finish_reason: str | None,
    versions: Iterable[str],
    mask: Sequence[Sequence[int]] | None = None,
    routing: np.ndarray | None = None,
) -> Sample:
    """vLLM's answer as a sample. ``versions`` are the labels of the weights it was sampled with: the oldest counts.
    ``mask`` are the tokens of the vocabulary that its sampler kept for each token of the response."""
    return Sample(
        prompt_ids=request.prompt_ids,
        response_ids=tuple(response),
        logprobs=tuple(logprobs),
        text=tokenizer.decode(response, skip_special_tokens=True),
        truncated=finish_reason == "length",
        weight_version=min(version_of(label) for label in versions),
        support=None if mask is None else KeptTokens.of_lists(mask),
        routing=routing,
    )


def version_of(label: str) -> int:
    """The number of a version that vLLM reports; the weights it started with have none."""
    return int(label) if label.isdigit() else 0


def gpu_arguments(share: float, *, batch_size: int) -> dict[str, Any]:
    """vLLM's engine arguments on a GPU: a share of its memory, and prompt passes as long as the planner counts them."""
    return {"gpu_memory_utilization": share, "max_num_batched_tokens": max(PREFILL_TOKENS, batch_size)}


def cpu_arguments(config: Any, *, engines: int, batch_size: int, max_tokens: int, dtype: str) -> dict[str, Any]:
    """vLLM's engine arguments on a CPU with ``engines`` of them: a KV cache for a full batch, if there is room.

    Prompts are never cut: vLLM 0.32 cannot take back a seeded sample that it took for a part of a prompt there.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * getattr(torch, dtype).itemsize
    room = psutil.virtual_memory().available // 2 // engines
    return {
        "kv_cache_memory_bytes": min(batch_size * max_tokens * per_token + CACHE_SLACK, room),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_tokens, 8192),
    }

"""Which kernels this run's layers will use, found out before any weights are loaded.

Transformer Engine chooses its attention when it is first called, and falls back without a word to one that keeps the
``[heads, S, S]`` probabilities of every sequence. For packed sequences cuDNN's needs a Hopper GPU or newer; an Ampere
(A100, A800) needs flash-attn. ``describe`` asks Transformer Engine itself, with what it will be called with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_ext.model.architectures import Architecture
from megatron_ext.model.layers import have_transformer_engine
from megatron_ext.model.megatron_config import Fusions


def describe(
    a: Architecture, *, tensor: int, context: int = 1, dtype: torch.dtype, longest: int, fusions: Fusions
) -> str:
    """The kernels in one line. ``tensor``: parallel ranks of a layer; ``context``: of a sequence, which has ``longest``
    tokens.

    Raises ValueError if Transformer Engine is installed and cannot be imported on a GPU, or would not use a fused
    attention for a 16-bit model (for fp32 there is none: such models are tests, without context parallelism).
    """
    if have_transformer_engine():
        attention = _attention(a, tensor=tensor, context=context, dtype=dtype, longest=longest)
        on = [field.name for field in dataclasses.fields(fusions) if getattr(fusions, field.name)]
        rounded = dtype == torch.float32 and os.getenv("NVIDIA_TF32_OVERRIDE") != "0"
        tf32 = "; fp32 products in TF32 (NVIDIA_TF32_OVERRIDE=0 makes them exact)" if rounded else ""
        return f"Transformer Engine's layers; attention: {attention}; fusions: {', '.join(on) or 'none'}{tf32}"
    if not torch.cuda.is_available():
        return "torch's layers on the CPU; fusions: none"
    if importlib.util.find_spec("transformer_engine") is not None:
        raise ValueError(f"Transformer Engine is installed and cannot be imported: {_import_fault()}")
    return "torch's layers, for Transformer Engine is not installed; fusions: none"


def _import_fault() -> str:
    """Why, and what to do."""
    try:
        importlib.import_module("transformer_engine.pytorch.fp8")  # what Megatron-Core tries
    except Exception as error:
        return f"{type(error).__name__}: {error}; build it for this torch and CUDA, or uninstall it"
    return "at first, and now it can; start again"


def _attention(a: Architecture, *, tensor: int, context: int, dtype: torch.dtype, longest: int) -> str:
    """The attention that Transformer Engine takes for packed sequences in training."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    params = utils.AttentionParams(
        qkv_dtype=dtype,
        qkv_layout="thd_thd_thd",
        num_heads=a.num_heads // tensor,
        num_gqa_groups=a.num_groups // tensor,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        head_dim_qk=a.head_dim,
        head_dim_v=a.head_dim,
        attn_mask_type="padding_causal",
        window_size=(-1, 0),
        core_attention_bias_shape=None,
        core_attention_bias_requires_grad=False,
        context_parallel=context > 1,
        deterministic=not int(os.getenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")),
        is_training=True,
    )
    with _reasons(utils) as reasons:
        flash, flash_version, fused, backend, _, _ = utils.get_attention_backend(params)
    if flash:
        return f"flash-attn {flash_version}"
    if fused:
        return f"cuDNN ({backend.name})"
    if dtype == torch.float32 and context == 1:
        return "unfused, there is no other in fp32"
    if dtype == torch.float32:
        raise ValueError(
            f"attention: Transformer Engine has none in fp32 for sequences that are cut, parallel.context = {context}; "
            'set parallel.context = 1, or model.dtype = "bfloat16"'
        )
    found = utils.FlashAttentionUtils
    without = f"would take its unfused kernel, whose memory grows with the square of a sequence's {longest} tokens,"
    if context > 1:
        without = f"has none for sequences that are cut, parallel.context = {context},"
    raise ValueError(
        f"attention: Transformer Engine {without} on {torch.cuda.get_device_name()} (compute capability "
        f"{'.'.join(map(str, torch.cuda.get_device_capability()))}). Install flash-attn, at least "
        f"{found.version_required} and at most {found.max_version} for this version:\n"
        f"  pip install --no-build-isolation flash-attn=={found.max_version}\n"
        "and leave NVTE_FLASH_ATTN and NVTE_FUSED_ATTN unset. Transformer Engine says:\n  " + "\n  ".join(reasons)
    )


@contextlib.contextmanager
def _reasons(utils: Any) -> Iterator[list[str]]:
    """Within, what Transformer Engine logs about the attentions it leaves out, and prints nothing of."""
    lines: list[str] = []
    logger, level = logging.getLogger("DotProductAttention"), utils.AttentionLogging._log_level
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.propagate, utils.AttentionLogging._log_level = False, logging.DEBUG
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate, utils.AttentionLogging._log_level = True, level
        lines[:] = [line for line in lines if "Disabling" in line or "install" in line]

"""Rotary frequencies, in fp32 and in the order of operations of ``transformers``, so that both agree to the bit.

    f_i = theta^(-2i / head_dim)        i = 0 .. head_dim/2 - 1

Llama 3.1 and later divide the frequencies of long wavelengths by a factor, and go from one to the other smoothly:

    long     wavelength 2 pi / f_i above L / low_freq_factor      f_i / factor
    short    below L / high_freq_factor                           f_i
    between  s f_i + (1 - s) f_i / factor,  s = (L / wavelength - low) / (high - low)

with L the context length before the extension (``original_max_position_embeddings``).

Without Transformer Engine Megatron-Core rotates packed sequences by walking over them in every layer, and computes cos
and sin each time. On a CPU ``rotate_packed`` takes the place of that function.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_ext.model import layer_ops
from megatron_ext.model.architectures import Architecture


def frequencies(a: Architecture, device: torch.device | str) -> Tensor:
    """``[head_dim / 2]``, fp32."""
    even = torch.arange(0, a.head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32)
    plain = 1.0 / (a.rope_theta ** (even / a.head_dim))
    scaling = a.rope_scaling
    if scaling is None:
        return plain
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    long, short = wavelength > length / low, wavelength < length / high
    stretched = torch.where(long, plain / scaling.factor, plain)
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where(~short & ~long, between, stretched)


def keep_no_angles(embedding: Any) -> None:
    """Have a Megatron ``RotaryEmbedding`` compute the angles of each forward anew.

    It would keep those of the last 32 longest sequences that it has seen, 4 head_dim bytes a token: 2 GB of a GPU where
    they have up to 128k tokens.
    """
    embedding.forward = type(embedding).forward.__wrapped__.__get__(embedding)


def rotate_packed(x: Tensor, starts: Tensor, angles: Tensor, **_unused: Any) -> Tensor:
    """``[S, heads, head_dim]`` rotated by each token's position in its sequence.

    ``starts [B + 1]`` are cumulative lengths, ``angles [longest, 1, 1, head_dim]`` those of each position. Where
    prompts are shared or sequences cut, the positions come with the starts (layers.share_prompts, cut_over_context).
    The cos and sin of the last sequences are kept with the angles: all layers ask for the same ones.
    """
    known = vars(angles)
    if known.get("starts") is not starts or known["cos"].dtype != x.dtype:
        position = vars(starts).get("position")
        if position is None:
            position = torch.arange(len(x), device=x.device) - starts[:-1].repeat_interleave(starts.diff())
        cos, sin = (function(angles)[position, 0].to(x.dtype) for function in (torch.cos, torch.sin))
        known.update(starts=starts, cos=cos, sin=sin)
    return layer_ops.rotate(x, known["cos"], known["sin"])


def use_rotate_packed() -> None:
    """From now on Megatron-Core's layers rotate by ``rotate_packed``, where they would not by Transformer Engine."""
    cast(Any, rope_utils)._apply_rotary_pos_emb_thd = rotate_packed

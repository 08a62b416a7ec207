"""Rotary frequencies, in fp32 and in the order of operations of ``transformers``, so that both agree to the bit.

    f_i = theta^(-2i / head_dim)        i = 0 .. head_dim/2 - 1

Llama 3.1 and later divide the frequencies of long wavelengths by a factor, and go from one to the other smoothly:

    long     wavelength 2 pi / f_i above L / low_freq_factor      f_i / factor
    short    below L / high_freq_factor                           f_i
    between  s f_i + (1 - s) f_i / factor,  s = (L / wavelength - low) / (high - low)

with L the context length before the extension (``original_max_position_embeddings``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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

"""The truth of all operator tests: full vocabulary, any dtype, differentiable by autograd, one definition a function.

Shapes: logits ``[T, V]`` raw (before temperature), targets ``[T]`` int64, temperature a number or ``[T]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    scale = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).reshape(-1, 1)
    return torch.log_softmax(logits / scale, dim=-1)


def logprob(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    return log_softmax(logits, temperature).gather(-1, targets[:, None])[:, 0]


def entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    logp = log_softmax(logits, temperature)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)


def nucleus_mask(logits: Tensor, top_p: float, temperature: float | Tensor = 1.0, nucleus: str = "inclusive") -> Tensor:
    """``[T, V]`` bool. The cutoff token is the first, in descending order, at which the mass reaches ``top_p``.

    ``inclusive`` keeps it, ``exclusive`` does not; tokens of its logit are treated as one. With ``top_p`` 1 it has
    the lowest finite logit.
    """
    value, order = logits.detach().double().sort(dim=-1, descending=True, stable=True)
    mass = log_softmax(value, temperature).exp().cumsum(-1)
    finite = (value > -torch.inf).sum(-1, keepdim=True)
    before = (mass < top_p).sum(-1, keepdim=True) if top_p < 1 else finite
    cutoff = torch.minimum(before, finite - 1)
    theta = value.gather(-1, cutoff)
    kept = value >= theta if nucleus == "inclusive" else value > theta
    return torch.zeros_like(kept).scatter(-1, order, kept)


def min_p_mask(logits: Tensor, min_p: float, temperature: float | Tensor = 1.0, nucleus: str = "inclusive") -> Tensor:
    """``[T, V]`` bool: probabilities of at least (inclusive) or above (exclusive) ``min_p`` times the largest."""
    logp = log_softmax(logits.detach().double(), temperature)
    least = logp.amax(-1, keepdim=True) + math.log(min_p)
    return (logp >= least if nucleus == "inclusive" else logp > least) & (logits > -torch.inf)


def nucleus_entropy(logits: Tensor, mask: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of the distribution renormalised inside ``mask``; an empty nucleus has entropy 0 and no gradient."""
    inside = torch.where(mask | ~mask.any(-1, keepdim=True), logits, -torch.inf)
    return torch.where(mask.any(-1), entropy(inside, temperature), 0.0)


def nucleus_logprob(logits: Tensor, targets: Tensor, mask: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probability renormalised inside ``mask``; minus infinity without gradient for a target outside."""
    inside = mask.gather(-1, targets[:, None])
    return torch.where(
        inside[:, 0], logprob(torch.where(mask | ~inside, logits, -torch.inf), targets, temperature), -torch.inf
    )


def nucleus_mass(logits: Tensor, mask: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    return (log_softmax(logits, temperature).exp() * mask).sum(-1)


def sampling_mask(
    logits: Tensor, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """``[T, V]`` bool: what a sampler keeps after temperature, then min_p, top_k and top_p on the renormalised rest.

    Tokens of the same logit as the last one kept are kept. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 restrict nothing.
    """
    p = log_softmax(logits.detach().double(), temperature).exp()
    kept = p >= min_p * p.amax(-1, keepdim=True)
    if top_k:
        ordered = p.sort(dim=-1, descending=True).values
        kept &= p >= ordered[:, min(top_k, p.shape[1]) - 1, None]
    if top_p < 1:
        q = torch.where(kept, p, 0) / torch.where(kept, p, 0).sum(-1, keepdim=True)
        ordered = q.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        kept &= q >= ordered.gather(-1, (before < top_p).sum(-1, keepdim=True) - 1)
    return kept & (logits > -torch.inf)

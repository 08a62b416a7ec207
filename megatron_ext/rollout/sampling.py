"""The distribution that is sampled from, and reproducible sampling from it: Gumbel noise from a counter-based hash of
(seed, position, token).

The largest of ``log p + Gumbel noise`` is an exact sample of p. Because the noise of a response depends on
its own seed only, the token does not depend on what else is in the batch or which rank serves it.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megatron_ext.hashing import GAMMA, mix, shift_right
from megatron_ext.kept_tokens import Restriction

NOTHING = Restriction()  # is left out


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers (run seed, step, prompt, sample): far apart for neighbours."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def gumbel(seeds: Tensor, position: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise ``[B, V]`` in fp32 for token ``position`` of the responses with ``seeds [B]`` int64."""
    row = mix(seeds + torch.tensor(position + 1, device=seeds.device) * GAMMA)
    key = mix(row[:, None] + torch.arange(1, vocab_size + 1, device=seeds.device) * GAMMA)
    uniform = (shift_right(key, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log().float()


def sampling_logprobs(logits: Tensor, *, temperature: float, restriction: Restriction = NOTHING) -> Tensor:
    """Log-probabilities ``[B, V]`` fp32 of the sampling distribution; minus infinity for tokens that are left out.

    After the temperature, min-p leaves out tokens whose probability is below ``min_p`` times the likeliest one's. Of
    the rest top-k keeps the likeliest, and of these, renormalised, top-p those down to the one at which the cumulative
    mass reaches ``top_p``. Tokens tied with the last one kept are kept. vLLM's order (0.32, v1/sample/sampler.py).
    """
    top_k, top_p, min_p = restriction
    logprob = (logits.float() / temperature).log_softmax(-1)
    if min_p > 0:
        logprob = _renormalised(logprob, logprob.amax(-1, keepdim=True) + math.log(min_p))
    if 0 < top_k < logits.shape[-1]:
        logprob = _renormalised(logprob, logprob.topk(top_k).values[..., -1:])
    if top_p < 1.0:
        ordered = logprob.sort(-1, descending=True).values
        before = ordered.exp().cumsum(-1) - ordered.exp()
        kept = (before < top_p).sum(-1, keepdim=True)
        logprob = _renormalised(logprob, ordered.gather(-1, kept - 1))
    return logprob


def _renormalised(logprob: Tensor, threshold: Tensor) -> Tensor:
    """Of the tokens at or above the threshold ``[B, 1]``."""
    return torch.where(logprob >= threshold, logprob, -torch.inf).log_softmax(-1)

"""The tokens of the vocabulary that the sampler kept, where the last stage's statistics need them.

What the engine recorded comes with the micro-batch. What it did not is computed from the logits of the pass at hand,
exactly and the same on every tensor-parallel rank, and stays with the micro-batch: the first pass over it must be one
of the policy that sampled; those that follow see the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_ext.kept_tokens import KeptTokens
from megatron_ext.model.build import Policy
from megatron_ext.ops import Support, sampling_support
from megatron_ext.ops.linear_policy_stats import chunk_tokens
from megatron_ext.types import PackedSequences


def support_of(
    micro_batch: PackedSequences, policy: Policy, parts: Iterable[Tensor], temperature: float, device: torch.device
) -> Support | None:
    """Of the micro-batch's response tokens on ``device``; None where nothing is replayed.

    ``parts``: the logits of these tokens, ``[T, V/TP]`` in parts one after the other, read only where they are needed.
    """
    packed = micro_batch.support
    if packed is None:
        return None
    if not packed.is_known:
        options = {"temperature": temperature, **packed.restriction._asdict()}
        with torch.no_grad():
            found = [_on_host(sampling_support(logits, policy.vocab_shard, **options)) for logits in parts]
        packed.fill(KeptTokens.join(found), micro_batch.targets.numpy())
    ids, starts = map(torch.from_numpy, packed.kept)
    return Support(ids.to(device).long(), starts.to(device))


def logits_in_parts(policy: Policy, hidden: Tensor) -> Iterator[Tensor]:
    """``[T, D]`` to ``[T, V/TP]`` without gradient, as many tokens at once as the fused head takes."""
    weight = policy.head_weight.detach()
    for part in hidden.detach().split(chunk_tokens(len(weight), hidden.element_size())):
        yield part @ weight.T


def _on_host(support: Support) -> KeptTokens:
    return KeptTokens(support.ids.to("cpu", torch.int32).numpy(), support.starts.to("cpu", torch.int64).numpy())

"""Layer steps with a written-out backward: the bits of the eager chain forward, and its gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import architectures, build, forward, layer_ops, parallel, rope
from megatron_ext.model.layers import PackedAttention
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.train import packing
from tests import gloo, tiny

LENGTHS = (5, 1, 9, 3)
ANGLES = torch.outer(torch.arange(9.0), 10.0 ** -torch.arange(4.0)).repeat(1, 2)[:, None, None]  # [longest, 1, 1, 8]
walked = rope_utils._apply_rotary_pos_emb_thd  # before any model is built here: Megatron-Core's own


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def plain_rope(x: Tensor) -> Tensor:
    angles = torch.cat([ANGLES[:length, 0] for length in LENGTHS]).to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Sequence by sequence, from the definition; two query heads share a group."""
    out = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~causal, -torch.inf).softmax(-1), v).flatten(1))
    return torch.cat(out)


def packed_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    config: Any = SimpleNamespace(attention_dropout=0.0, softmax_scale=None)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts_of(LENGTHS), cu_seqlens_kv=starts_of(LENGTHS))
    attention = PackedAttention(config, 1, AttnMaskType.causal)
    return attention(query, key, value, None, packed_seq_params=params)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-3)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


TOKENS = sum(LENGTHS)
CASES: dict[str, tuple[Callable, Callable, tuple[Tensor, ...]]] = {
    "norm": (lambda x, w: layer_ops.rms_norm(x, w, 1e-3), plain_norm, (draw(TOKENS, 1, 32), 1 + draw(32))),
    "norm of heads": (lambda x, w: layer_ops.rms_norm(x, w, 1e-3), plain_norm, (draw(TOKENS, 1, 4, 8), 1 + draw(8))),
    "swiglu": (layer_ops.swiglu, plain_swiglu, (draw(TOKENS, 1, 24),)),
    "rope": (lambda x: rope.rotate_packed(x, starts_of(LENGTHS), ANGLES.clone()), plain_rope, (draw(TOKENS, 3, 8),)),
    "attention": (
        packed_attention,
        plain_attention,
        (draw(TOKENS, 4, 8), draw(TOKENS, 2, 8), draw(TOKENS, 2, 8, seed=1)),
    ),
}


def differentiated(function: Callable, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    ours, plain, inputs = CASES[name]
    found, expected = differentiated(ours, inputs, torch.float32), differentiated(plain, inputs, torch.float64)
    assert len(found) == len(inputs) + 1
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("name", ["norm", "norm of heads", "swiglu", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_has_the_bits_of_the_eager_chain(name: str, dtype: torch.dtype) -> None:
    ours, plain, inputs = CASES[name]
    if name == "rope":
        config: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        plain = lambda x: walked(x, starts_of(LENGTHS), ANGLES, cp_group=config)  # noqa: E731
    given = [x.to(dtype) for x in inputs]
    assert torch.equal(ours(*given), plain(*given))


def test_angles_of_other_sequences_are_not_taken_for_these() -> None:
    """Where one tensor of angles serves micro-batches of different sequences."""
    angles, x = ANGLES.clone(), draw(TOKENS, 3, 8)
    first = rope.rotate_packed(x, starts_of(LENGTHS), angles)
    rope.rotate_packed(x, starts_of(tuple(reversed(LENGTHS))), angles)
    assert torch.equal(rope.rotate_packed(x, starts_of(LENGTHS), angles), first)


def lengths_kept(rank: int, world: int, path: str) -> int:
    """Of how many lengths Megatron-Core keeps angles behind forwards of three."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_policy(architecture, ModelLayout(), ModelOptions(torch.float32))
    for parameter in policy.modules[0].parameters():
        parameter.data.normal_(0.0, 0.2)
    forward.forward(policy, [packing.pack([([1, 2], [3] * length)]) for length in (2, 5, 9)], Needs(), 1.0)
    kept: Any = RotaryEmbedding.forward
    return kept.cache_info().currsize


def test_no_angles_of_past_micro_batches_stay_in_memory() -> None:
    assert gloo.run(lengths_kept, 1, str(tiny.hf_model()[1])) == [0]

"""How large a model is, and each rank's shard of it: arithmetic on ``config.json``, no torch.

Two readings of one model, independent of each other and of the built shards (tools/dry_run.py compares all three):

    hf_tensors        name and shape of every tensor of the Hugging Face model
    stage_parameters  the parameters of one pipeline stage on one rank, in elements, in the order Megatron has them

Shapes: D hidden size, V vocabulary, F feed-forward size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ext.model.architectures import Architecture

ALIGNMENT = 64  # elements: where Megatron-Core's gradient buffers start a parameter
BUCKET_ALIGNMENT = 128  # elements: what ends a bucket, together with the data-parallel size


def attention_widths(a: Architecture) -> tuple[int, int]:
    """Columns of the query projection, and of the key or the value projection."""
    return a.num_heads * a.head_dim, a.num_groups * a.head_dim


def hf_tensors(a: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the model's safetensors files; a tied output layer is stored once."""
    D, (q, kv) = a.hidden_size, attention_widths(a)
    yield "model.embed_tokens.weight", (a.vocab_size, D)
    for layer in range(a.num_layers):
        at = f"model.layers.{layer}."
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield f"{at}self_attn.{name}.weight", (width, D)
            if a.qkv_bias:
                yield f"{at}self_attn.{name}.bias", (width,)
        yield f"{at}self_attn.o_proj.weight", (D, q)
        if a.qk_norm:
            yield f"{at}self_attn.q_norm.weight", (a.head_dim,)
            yield f"{at}self_attn.k_norm.weight", (a.head_dim,)
        yield f"{at}input_layernorm.weight", (D,)
        yield f"{at}post_attention_layernorm.weight", (D,)
        parts, F = [""], a.ffn_size
        if a.experts is not None and a.has_experts(layer):
            yield f"{at}mlp.gate.weight", (a.experts.num, D)
            parts, F = [f"experts.{number}." for number in range(a.experts.num)], a.experts.ffn_size
        for part in parts:
            yield f"{at}mlp.{part}gate_proj.weight", (F, D)
            yield f"{at}mlp.{part}up_proj.weight", (F, D)
            yield f"{at}mlp.{part}down_proj.weight", (D, F)
    yield "model.norm.weight", (D,)
    if not a.tied:
        yield "lm_head.weight", (a.vocab_size, D)


@functools.cache
def num_parameters(a: Architecture) -> int:
    """Parameters of the Hugging Face model, a tied output layer counted once."""
    return sum(math.prod(shape) for _, shape in hf_tensors(a))


def active_parameters(a: Architecture) -> int:
    """Weights in one token's matrix products: 2 operations each forward, 4 backward. The output layer counts."""
    q, kv = attention_widths(a)
    total = a.vocab_size * a.hidden_size
    for layer in range(a.num_layers):
        total += a.hidden_size * (2 * q + 2 * kv)
        if a.experts is not None and a.has_experts(layer):
            total += a.hidden_size * (3 * a.experts.ffn_size * a.experts.top_k + a.experts.num)
        else:
            total += a.hidden_size * 3 * a.ffn_size
    return total


@dataclass(frozen=True)
class Sharding:
    """Over how many ranks weights are sharded, and over how many data- (and context-) parallel ones the optimizer."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    expert_data: int = 1


@dataclass(frozen=True)
class Parameter:
    """One parameter of one rank. ``own_bucket``: a copy of the embedding that another stage shares."""

    numel: int
    expert: bool = False
    own_bucket: bool = False


def stage_parameters(
    a: Architecture, s: Sharding, layers: Sequence[int], *, first: bool, last: bool, critic: bool = False
) -> list[Parameter]:
    """What one rank holds of a stage (or of one virtual stage) with the decoder layers ``layers``.

    ``critic``: a value head stands in the place of the output layer, and nothing is tied.
    """
    D = a.hidden_size
    vocabulary = Parameter(a.padded_vocab(s.tensor) // s.tensor * D, own_bucket=a.tied and not (first and last))
    parameters = [vocabulary] if first else []
    for layer in layers:
        parameters += _layer_parameters(a, s, layer)
    if last:
        parameters.append(Parameter(D))
    if last and critic:
        parameters += [Parameter(D), Parameter(1)]
    elif last and not (a.tied and first):
        parameters.append(vocabulary)
    return parameters


def _layer_parameters(a: Architecture, s: Sharding, layer: int) -> list[Parameter]:
    D, T, (q, kv) = a.hidden_size, s.tensor, attention_widths(a)
    qkv = (q + 2 * kv) // T
    sizes = [D, q // T * D, qkv * D, *([qkv] if a.qkv_bias else [])]
    sizes += [a.head_dim, a.head_dim] if a.qk_norm else []
    sizes.append(D)
    if a.experts is None or not a.has_experts(layer):
        return [Parameter(size) for size in (*sizes, 2 * a.ffn_size // T * D, a.ffn_size // T * D)]
    F = a.experts.ffn_size // s.expert_tensor
    expert = [Parameter(2 * F * D, expert=True), Parameter(F * D, expert=True)]
    return [*(Parameter(size) for size in (*sizes, a.experts.num * D)), *expert * (a.experts.num // s.expert)]


@dataclass(frozen=True)
class Buffers:
    """Elements of parameters on one rank as the distributed optimizer lays them out.

    ``padded`` is what weights and gradients occupy, ``owned`` what this data-parallel rank's optimizer updates.
    """

    parameters: int = 0
    padded: int = 0
    owned: int = 0

    def __add__(self, other: Buffers) -> Buffers:
        return Buffers(self.parameters + other.parameters, self.padded + other.padded, self.owned + other.owned)


def buffers(parameters: Sequence[Parameter], s: Sharding, bucket_size: float = math.inf) -> Buffers:
    """Megatron-Core's layout (core/distributed/param_and_grad_buffer.py) for the first data-parallel rank.

    A bucket is full when it has ``bucket_size`` elements or more.

    Parameters stand in reverse order, each aligned; dense and expert ones apart; every bucket is divided equally
    among its data-parallel ranks, and the first one's share holds the least padding.
    """
    padded = owned = 0
    for expert, ranks in ((False, s.data), (True, s.expert_data)):
        for bucket in _buckets([p for p in reversed(parameters) if p.expert == expert], bucket_size):
            spans, end = [], 0
            for size in bucket:
                start = -(-end // ALIGNMENT) * ALIGNMENT
                end = start + size
                spans.append((start, end))
            divisor = math.lcm(ranks, BUCKET_ALIGNMENT)
            share = -(-end // divisor) * divisor // ranks
            padded += share * ranks
            owned += sum(max(0, min(end, share) - start) for start, end in spans)
    return Buffers(sum(p.numel for p in parameters), padded, owned)


def _buckets(parameters: Sequence[Parameter], bucket_size: float) -> list[list[int]]:
    """Sizes bucket by bucket: a shared embedding has one of its own."""
    found: list[list[int]] = [[]]
    end = 0  # of the open bucket
    for parameter in parameters:
        if parameter.own_bucket:
            found += [[parameter.numel], []]
            end = 0
            continue
        found[-1].append(parameter.numel)
        end = -(-end // ALIGNMENT) * ALIGNMENT + parameter.numel
        if end >= bucket_size:
            found.append([])
            end = 0
    return [bucket for bucket in found if bucket]

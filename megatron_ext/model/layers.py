"""Layer specs: Transformer Engine's where it can be imported, otherwise torch modules of our own.

megatron-core's local spec has an RMSNorm that refuses sequence parallelism and an attention that does not
know packed sequences. The two modules here fill exactly these gaps, so that one data path (packed ``thd``
micro-batches) runs everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_ext.model import context, groups, layer_ops, zigzag


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight takes part in the sequence-parallel gradient all-reduce."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return layer_ops.rms_norm(x, self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence, or tree (``PackedSequences``).

    query ``[S, heads/TP, head_dim]``, key and value ``[S, groups/TP, head_dim]``, S tokens of all sequences.
    Sequences are laid side by side, padded at their ends: under a causal mask no real token sees padding.

    Under context parallelism the S tokens are this rank's; keys and values come from all ranks, and a query sees those
    up to its position in the whole sequence.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_unused):
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and config.attention_dropout == 0.0
        self.scale = config.softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        **_unused,
    ) -> Tensor:
        padded = _padded(packed_seq_params)
        if is_cut(packed_seq_params):
            key, value = context.all_ranks(torch.cat([key, value], 1)).chunk(2, 1)
        out = F.scaled_dot_product_attention(
            padded.queries.put(query),
            padded.keys.put(key),
            padded.keys.put(value),
            attn_mask=padded.mask,
            is_causal=padded.mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return layer_ops.take(out.transpose(1, 2).flatten(0, 1).flatten(1), padded.queries.slots)


class _Rows(NamedTuple):
    """Sequences, or trees, side by side, padded at their ends to the longest."""

    slots: Tensor  # [S]: where each token stands
    number: int
    longest: int

    def put(self, x: Tensor) -> Tensor:
        """``[S, heads, head_dim] -> [number, heads, longest, head_dim]``"""
        placed = layer_ops.put(x, self.slots, self.number * self.longest)
        return placed.unflatten(0, (self.number, self.longest)).transpose(1, 2)

    def row(self, x: Tensor) -> Tensor:
        """``[S] -> [number, 1, longest]``"""
        return layer_ops.put(x, self.slots, self.number * self.longest).view(self.number, 1, self.longest)


class _Padded(NamedTuple):
    queries: _Rows
    keys: _Rows  # the same, but under context parallelism
    mask: Tensor | None  # [number, 1, queries' longest, keys' longest], True: is seen. None: a causal one


def share_prompts(packed_seq_params: PackedSeqParams, position: Tensor, branch: Tensor) -> None:
    """Have the layers without Transformer Engine read trees.

    What Megatron-Core does not know travels with what it hands on: to the rotation cumulative lengths alone.
    """
    vars(packed_seq_params.cu_seqlens_q)["position"] = position
    vars(packed_seq_params)["branch"] = branch


def cut_over_context(packed_seq_params: PackedSeqParams, position: Tensor) -> None:
    """Have layers read this rank's part of every sequence (zigzag.py), whose tokens stand at ``position [S/C]``.

    The padding that makes a sequence divisible counts as its tokens: it is at the end, where under a causal mask none
    of the others sees it. flash-attn knows no gaps between sequences.
    """
    packed_seq_params.cu_seqlens_q_padded = packed_seq_params.cu_seqlens_q
    packed_seq_params.cu_seqlens_kv_padded = packed_seq_params.cu_seqlens_kv
    vars(packed_seq_params.cu_seqlens_q)["position"] = position


def is_cut(packed_seq_params: PackedSeqParams) -> bool:
    """Whether the tokens are one context-parallel rank's."""
    return packed_seq_params.cu_seqlens_q_padded is not None


def _padded(packed_seq_params: PackedSeqParams) -> _Padded:
    """Found once for all layers of a micro-batch."""
    known = vars(packed_seq_params)
    if "padded" not in known:
        starts, mask = packed_seq_params.cu_seqlens_q.long(), None
        queries = keys = _rows(starts)
        if is_cut(packed_seq_params):
            group = groups.context()
            parts = [zigzag.own_tokens(starts, rank, group.size()) for rank in range(group.size())]
            queries = _rows(starts // group.size())
            position = queries.row(keys.slots[parts[group.rank()]] % keys.longest)
            mask = torch.arange(keys.longest, device=starts.device) <= position[..., None]
            keys = keys._replace(slots=keys.slots[torch.cat(parts)])
        elif "branch" in known:
            branch = queries.row(known["branch"])
            sees = (branch[:, :, None] == 0) | (branch[:, :, None] == branch[..., None])
            mask = sees.tril()
        known["padded"] = _Padded(queries, keys, mask)
    return known["padded"]


def _rows(starts: Tensor) -> _Rows:
    """Of sequences, or trees, with the cumulative lengths ``starts [B + 1]``."""
    lengths = starts.diff()
    number, longest = len(lengths), int(lengths.max())
    shift = torch.arange(number, device=starts.device) * longest - starts[:-1]
    slots = torch.arange(int(starts[-1]), device=starts.device) + shift.repeat_interleave(lengths)
    return _Rows(slots, number, longest)


class SwiGLU(MLP):
    """Megatron's MLP of a dense layer, its activation in one step. model.deterministic has one of its own."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_unused) -> tuple[Tensor, None]:
        assert per_token_scale is None and not self.config.add_bias_linear
        hidden, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(layer_ops.swiglu(hidden))
        return output, None


def have_transformer_engine() -> bool:
    """Whether Megatron-Core could import Transformer Engine, and so builds layers of it. False without a GPU."""
    return transformer_engine.HAVE_TE


def layer_spec(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    """The spec of one decoder layer, with a mixture of experts or a plain MLP."""
    num_experts = config.num_moe_experts if experts else None
    if have_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer: Any = spec.submodules
    attention = dataclasses.replace(layer.self_attention.submodules, core_attention=PackedAttention)
    if config.qk_layernorm:
        attention = dataclasses.replace(attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    names = dict(layer.sharded_state_dict_keys_map)  # a checkpoint has Transformer Engine's names, whoever wrote it
    if experts:
        del names["pre_mlp_layernorm."]  # which stays apart from the experts there too
    layer = dataclasses.replace(
        layer,
        mlp=layer.mlp if experts or config.deterministic_mode else dataclasses.replace(layer.mlp, module=SwiGLU),
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(layer.self_attention, submodules=attention),
        sharded_state_dict_keys_map=names,
    )
    return dataclasses.replace(spec, submodules=layer)


def block_spec(config: TransformerConfig, experts: Sequence[bool]) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, each with experts or without, and the norm that ends the model."""
    specs = {kind: layer_spec(config, experts=kind) for kind in set(experts)}
    norm = LayerNormImpl if have_transformer_engine() else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in experts], layer_norm=norm)  # pyright: ignore[reportArgumentType]

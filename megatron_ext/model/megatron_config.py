"""An ``Architecture`` under a ``ModelLayout`` -> Megatron-Core's ``TransformerConfig``.

Choices for reinforcement learning, the same for every model:

- no dropout, no router jitter, no token dropped: a token's log-prob depends on its sequence and the weights alone;
- the router works in fp32 and chooses by plain top-k; the auxiliary balance losses are off, so the gradient is the
  method's and nothing else (``router_aux_loss_coef`` of config.json, meant for pre-training, is not used);
- gradients are summed over micro-batches, data- and context-parallel ranks and divided by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_ext import cpu_compat
from megatron_ext.config.schema import ModelConfig
from megatron_ext.model import deterministic
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.layers import have_transformer_engine


@dataclass(frozen=True)
class ModelLayout:
    """How one copy of the model is sharded over ranks.

    A pipeline rank r holds the stages r, r + pipeline, ... (``virtual`` of them, the interleaved schedule); stage s
    has ``stage_layers[s]`` decoder layers, or all stages equally many when none are given.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    stage_layers: tuple[int, ...] = ()
    sequence: bool = False  # sequence parallelism over the tensor-parallel group
    context: int = 1  # ranks that share the tokens of each sequence out
    expert: int = 1  # ranks that share the experts out
    expert_tensor: int = 1  # tensor parallelism within an expert

    def stages(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each stage. Raises ValueError when they do not add up to ``num_layers``."""
        count = self.pipeline * self.virtual
        if not self.stage_layers and num_layers % count == 0:
            return (num_layers // count,) * count
        if len(self.stage_layers) != count or sum(self.stage_layers) != num_layers:
            raise ValueError(
                f"layout: {num_layers} layers on pipeline {self.pipeline} x virtual {self.virtual} = {count} stages "
                f"need stage_layers with {count} numbers that sum to {num_layers}; found {list(self.stage_layers)}"
            )
        return tuple(self.stage_layers)


@dataclass(frozen=True)
class Fusions:
    """Which fused kernels of Transformer Engine's layers a model uses: [model.fusions] of a recipe."""

    rope: bool = True
    bias_activation: bool = True
    gradient_accumulation: bool = True
    moe_permute: bool = True

    def here(self) -> Fusions:
        """These where there is Transformer Engine, none where there is not."""
        return self if have_transformer_engine() else Fusions(False, False, False, False)


RECOMPUTE: dict[str, dict[str, Any]] = {  # what backward computes again instead of keeping it
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class ModelOptions:
    """How a model computes, under any layout: keys of [model] of a recipe."""

    dtype: torch.dtype
    recompute: str = "none"  # a key of RECOMPUTE
    fusions: Fusions = Fusions()
    deterministic: bool = False

    @classmethod
    def from_config(cls, model: ModelConfig) -> ModelOptions:
        return cls(
            getattr(torch, model.dtype), model.recompute, Fusions(**model.fusions.model_dump()), model.deterministic
        )


def transformer_config(architecture: Architecture, layout: ModelLayout, options: ModelOptions) -> TransformerConfig:
    """The Megatron configuration of the architecture under a layout.

    Of the fusions, that of gradient accumulation is not in it but set on the layers (``build.py``): Megatron would
    ask its own output layer for it too, which needs apex. Norms are fused in Transformer Engine anyway, and
    ``persist_layer_norm`` is an option of apex's.

    ``calculate_per_token_loss`` makes Megatron add gradients over micro-batches and data-parallel ranks without
    dividing by their number: the weights of the loss already carry the full mini-batch's counts.
    """
    a, cuda, fused = architecture, cpu_compat.device().type == "cuda", options.fusions.here()
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=a.num_groups,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.ffn_size,
        gated_linear_unit=True,
        activation_func=deterministic.silu if options.deterministic else F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_eps,
        qk_layernorm=a.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(a, layout),
        sequence_parallel=layout.sequence,
        context_parallel_size=layout.context,
        pipeline_dtype=options.dtype,
        # interleaved stages exchange activations and gradients in calls of their own: in one batch, two pipeline
        # ranks, each the other's next and previous, would take one for the other
        overlap_p2p_comm=layout.virtual > 1,
        batch_p2p_comm=layout.virtual == 1,
        params_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the only one that takes variable lengths
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
        persist_layer_norm=False,
        deterministic_mode=options.deterministic,
        bias_activation_fusion=fused.bias_activation,
        bias_dropout_fusion=False,  # there is neither
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused.rope,
        **RECOMPUTE[options.recompute],
        **_moe_options(a, layout, fused),
    )


def stage_sizes(config: TransformerConfig) -> list[int]:
    """Decoder layers of each pipeline stage, in order over all ranks."""
    layout: Any = config.pipeline_model_parallel_layout
    if layout is None:
        return [config.num_layers]
    per_rank = layout.layout  # [pipeline rank][number of the stage on it] -> the layers of a stage
    return [stages[number].count(LayerType.decoder) for number in range(len(per_rank[0])) for stages in per_rank]


def _pipeline_layout(a: Architecture, layout: ModelLayout) -> list[list[str]] | None:
    if layout.pipeline == 1:
        return None
    stages = [["decoder"] * count for count in layout.stages(a.num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _moe_options(a: Architecture, layout: ModelLayout, fused: Fusions) -> dict[str, Any]:
    if a.experts is None:
        return {}
    mixed = [int(a.has_experts(layer)) for layer in range(a.num_layers)]
    return {
        "num_moe_experts": a.experts.num,
        "moe_router_topk": a.experts.top_k,
        "moe_ffn_hidden_size": a.experts.ffn_size,
        "moe_layer_freq": mixed if a.experts.dense_layers else 1,
        "moe_router_pre_softmax": not a.experts.renormalise,  # renormalised top-k = softmax over the chosen alone
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": have_transformer_engine(),
        "moe_permute_fusion": fused.moe_permute,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }

"""An HF configuration under a layout -> this rank's Megatron model, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from megatron_ext import host
from megatron_ext.model import groups, rope
from megatron_ext.model.hf_config import Architecture
from megatron_ext.model.layers import block_spec
from megatron_ext.model.megatron_config import ModelLayout, stage_sizes, transformer_config
from megatron_ext.ops.shard import VocabShard


@dataclass(frozen=True)
class Policy:
    """This rank's part of a model. ``chunks`` are what Megatron's schedules take: ``modules``, wrapped if trained.

    ``fused_head``: its statistics are taken from hidden states, the logits of a micro-batch never exist together.
    """

    architecture: Architecture
    modules: list[GPTModel]
    chunks: list[Any]
    fused_head: bool = False

    @property
    def head_weight(self) -> Tensor:
        """``[V/TP, D]``: the output layer's rows of this rank, on the last stage."""
        last: Any = self.modules[-1]
        return last.shared_embedding_or_output_weight() if self.architecture.tied else last.output_layer.weight

    @property
    def stages(self) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage, of all ranks."""
        return tuple(stage_sizes(self.modules[0].config))

    @property
    def vocab_shard(self) -> VocabShard:
        """The columns of the logits that this tensor-parallel rank holds."""
        group = groups.tensor()
        width = self.architecture.padded_vocab(group.size()) // group.size()
        return VocabShard(
            start=group.rank() * width,
            stop=(group.rank() + 1) * width,
            vocab_size=self.architecture.vocab_size,
            group=group,
        )


class HiddenStateModel(GPTModel):
    """A GPTModel whose last stage returns hidden states: ``[S, 1, D]``, ``[S/TP, 1, D]`` with sequence parallelism.

    What is read of them is chosen before the output layer (forward.py).
    """

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def build_modules(
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    recompute: str = "none",
    **layout: Any,
) -> list[GPTModel]:
    """This rank's stages with uninitialised weights, in order; ``layout`` holds the fields of ``ModelLayout``.

    Megatron's process groups must exist. Raises ValueError when the layers do not fit the stages.
    """
    spread = ModelLayout(**layout)
    config = transformer_config(architecture, spread, dtype, recompute)
    stages, rank = spread.stages(architecture.num_layers), groups.pipeline().rank()
    own = range(rank, len(stages), spread.pipeline)
    modules = [
        HiddenStateModel(
            config=config,
            transformer_layer_spec=block_spec(config, _with_experts(architecture, stages, stage)),  # pyright: ignore
            vocab_size=architecture.padded_vocab(spread.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=stage == 0,
            post_process=stage == len(stages) - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            vp_stage=number if spread.virtual > 1 else None,
        )
        for number, stage in enumerate(own)
    ]
    for module in modules:
        module.rotary_pos_emb.inv_freq = rope.frequencies(architecture, module.rotary_pos_emb.inv_freq.device)
        _mark_parameters(module)
        if module.post_process:
            _give_whole_rows(module.output_layer)
    return [module.to(device=host.device(), dtype=dtype) for module in modules]


def _mark_parameters(module: GPTModel) -> None:
    """Say which parameters are cut over tensor-parallel ranks, and which are experts'.

    Megatron-Core 0.16.1 says so where it draws initial weights, which is skipped here: unmarked, the parts on all
    ranks but the first would pass for copies and be left out of the gradient's norm. And it marks experts under
    expert parallelism only: without, tensor-parallel ranks that each hold whole experts would train them apart.
    Transformer Engine's layers are of other classes and mark their own.
    """
    cut: dict[type, int] = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for child in module.modules():
        weight = child.weight if type(child) in cut else None
        if isinstance(weight, Tensor) and not getattr(weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(weight, True, cut[type(child)], 1)
    for name, parameter in module.named_parameters():
        if ".experts." in name:
            vars(parameter)["allreduce"] = False


def _give_whole_rows(head: ColumnParallelLinear) -> None:
    """Each row comes to the output layer whole, on every tensor-parallel rank, and goes back with its whole gradient.

    Megatron would gather all rows of the sequence under sequence parallelism. The sum over ranks runs while the
    weight's gradient is computed.
    """
    head.sequence_parallel = False
    head.allreduce_dgrad = groups.tensor().size() > 1


def _with_experts(architecture: Architecture, stages: Sequence[int], stage: int) -> list[bool]:
    first = sum(stages[:stage])
    return [architecture.has_experts(layer) for layer in range(first, first + stages[stage])]


def build_policy(architecture: Architecture, *, fused_head: bool = False, **options: Any) -> Policy:
    """``build_modules`` ready for training."""
    return wrap(architecture, build_modules(architecture, **options), fused_head=fused_head)


def wrap(architecture: Architecture, modules: list[GPTModel], *, fused_head: bool = False) -> Policy:
    """The modules wrapped for data parallelism with a distributed-optimizer gradient buffer in fp32."""
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
    )
    chunks = [DistributedDataParallel(config=module.config, ddp_config=ddp, module=module) for module in modules]
    for module in modules:
        module.config.finalize_model_grads_func = _finalize
    return Policy(architecture, modules, chunks, fused_head)


def build_reference(architecture: Architecture, *, fused_head: bool = False, **options: Any) -> Policy:
    """``build_modules`` frozen: no gradients, no wrapper."""
    modules = build_modules(architecture, **options)
    for module in modules:
        module.requires_grad_(False)
    return Policy(architecture, modules, list(modules), fused_head)


def _finalize(model: list, num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction as a plain sum: the token count it offers to divide by is left out."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    policy: Policy, *, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float, clip_grad: float
) -> MegatronOptimizer:
    """AdamW with its state sharded over the data-parallel ranks (biases and norms carry no weight decay)."""
    dtype = policy.modules[0].config.params_dtype
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=lr,
        weight_decay=weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=eps,
        clip_grad=clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, policy.chunks)  # pyright: ignore[reportArgumentType]


def build_scheduler(
    optimizer: MegatronOptimizer, *, lr: float, warmup_steps: int, weight_decay: float
) -> OptimizerParamScheduler:
    """Linear warm-up over optimizer steps, then constant; the first step has lr / warmup_steps, not 0."""
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=warmup_steps + 1,
        lr_decay_style="constant",
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        override_opt_param_scheduler=False,
    )
    scheduler.step(1)
    return scheduler

"""An HF configuration under a layout -> this rank's Megatron model, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from megatron_ext import cpu_compat
from megatron_ext.model import deterministic, groups, rope
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.layers import block_spec
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions, stage_sizes, transformer_config
from megatron_ext.model.routing import PolicyRouting
from megatron_ext.ops.shard import VocabShard


@dataclass(frozen=True)
class Overlap:
    """What of data-parallel communication runs beside computation: keys of [parallel] of a recipe."""

    overlap_grad_reduce: bool = True  # during backward, bucket by bucket
    overlap_param_gather: bool = True  # during the next forward
    bucket_size: int = 0  # parameters; 0: Megatron's own


OVERLAPPED = Overlap()


@dataclass(frozen=True)
class Decay:
    """How the learning rate falls once it is warmed up."""

    schedule: str  # linear or cosine
    min_lr: float
    steps: int  # optimizer steps above min_lr, those of the warm-up included


@dataclass(frozen=True)
class Policy:
    """This rank's part of a model. ``chunks`` are Megatron's model chunks: ``modules``, wrapped for DDP if trained.

    ``fused_head``: its statistics are taken from hidden states, the logits of a micro-batch never exist together.
    ``routing``: its routers choose the experts that a micro-batch's tokens come with (routing.py).
    """

    architecture: Architecture
    modules: list[GPTModel]
    chunks: list[Any]
    fused_head: bool = False
    routing: PolicyRouting | None = None

    @property
    def head_weight(self) -> Tensor:
        """``[V/TP, D]``: this rank's shard of the output layer's weight, on the last stage."""
        last: Any = self.modules[-1]
        return last.shared_embedding_or_output_weight() if self.architecture.tied else last.output_layer.weight

    @property
    def deterministic(self) -> bool:
        """Whether its bits are the same at every tensor-parallel size."""
        return self.modules[0].config.deterministic_mode

    @property
    def can_share_prompts(self) -> bool:
        """Whether its layers read micro-batches in which several responses have one prompt.

        Those of a CPU do, attention and rotation (``rope.use_rotate_packed``); experts are balanced over the tokens of
        whole sequences; and context parallelism cuts sequences, not trees.
        """
        is_whole = groups.context().size() == 1
        return is_whole and cpu_compat.device().type == "cpu" and self.architecture.experts is None

    @property
    def stages(self) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage, of all ranks."""
        return tuple(stage_sizes(self.modules[0].config))

    @property
    def vocab_shard(self) -> VocabShard:
        """The columns of the logits that this tensor-parallel rank holds."""
        group, architecture = groups.tensor(), self.architecture
        padded_size = architecture.padded_vocab(group.size())
        return VocabShard.for_vocab(architecture.vocab_size, group, padded_size=padded_size)

    @contextmanager
    def before_gradient_exchange(self, call: Callable[[], None]) -> Iterator[None]:
        """Within, every backward calls ``call`` when this rank has its gradients, before it waits for the others'."""
        config: Any = self.modules[0].config  # one for all
        exchange = config.finalize_model_grads_func

        def called_first(*args: Any, **options: Any) -> None:
            call()
            exchange(*args, **options)

        config.finalize_model_grads_func = called_first
        try:
            yield
        finally:
            config.finalize_model_grads_func = exchange

    def finish_param_sync(self) -> None:
        """Gather what the last update changed and no forward has asked for yet. Collective over data-parallel ranks.

        A module waits for its weights before its forward; whoever reads them otherwise calls this first.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                bucket_groups = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
                for group in bucket_groups:
                    if not group.param_gather_dispatched:
                        group.start_param_sync()
                for group in bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)


class HiddenStateModel(GPTModel):
    """A GPTModel whose last stage returns hidden states: ``[S, 1, D]``, ``[S/TP, 1, D]`` with sequence parallelism.

    What is read of them is chosen before the output layer (forward.py).
    """

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def build_modules(architecture: Architecture, layout: ModelLayout, options: ModelOptions) -> list[GPTModel]:
    """This rank's stages with uninitialised weights, in order.

    Megatron's process groups must exist. Raises ValueError when the layers do not fit the stages.
    """
    config = transformer_config(architecture, layout, options)
    if cpu_compat.device().type != "cuda":
        rope.use_rotate_packed()
    stages, rank = layout.stages(architecture.num_layers), groups.pipeline().rank()
    own = range(rank, len(stages), layout.pipeline)
    modules = [
        HiddenStateModel(
            config=config,
            transformer_layer_spec=block_spec(config, _with_experts(architecture, stages, stage)),  # pyright: ignore
            vocab_size=architecture.padded_vocab(layout.tensor),
            max_sequence_length=architecture.max_positions,
            pre_process=stage == 0,
            post_process=stage == len(stages) - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            vp_stage=number if layout.virtual > 1 else None,
        )
        for number, stage in enumerate(own)
    ]
    for module in modules:
        module.rotary_pos_emb.inv_freq = rope.frequencies(architecture, module.rotary_pos_emb.inv_freq.device)
        rope.keep_no_angles(module.rotary_pos_emb)
        _mark_parameters(module)
        if module.post_process:
            _take_full_hidden_states(module.output_layer)
        if options.deterministic:
            deterministic.install(module, architecture)
        if options.fusions.here().gradient_accumulation:
            _accumulate_in_fp32(module)
    return [module.to(device=cpu_compat.device(), dtype=options.dtype) for module in modules]


def _mark_parameters(module: GPTModel) -> None:
    """Say which parameters are sharded over tensor-parallel ranks, and which are experts'.

    Megatron-Core 0.16.1 says so where it draws initial weights, which is skipped here: unmarked, the shards on all
    ranks but the first would pass for copies and be left out of the gradient's norm. And it marks experts under
    expert parallelism only: without, tensor-parallel ranks that each hold a copy of the experts would train them apart.
    Transformer Engine's layers are of other classes and mark their own.
    """
    shard: dict[type, int] = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for child in module.modules():
        weight = child.weight if type(child) in shard else None
        if isinstance(weight, Tensor) and not getattr(weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(weight, True, shard[type(child)], 1)
    for name, parameter in module.named_parameters():
        if ".experts." in name:
            vars(parameter)["allreduce"] = False


def _take_full_hidden_states(head: ColumnParallelLinear) -> None:
    """The output layer reads full hidden states on every tensor-parallel rank, and hands back their full gradient.

    Under sequence parallelism Megatron would gather those of all tokens. The sum over ranks runs while the weight's
    gradient is computed.
    """
    head.sequence_parallel = False
    head.allreduce_dgrad = groups.tensor().size() > 1


def _accumulate_in_fp32(module: GPTModel) -> None:
    """Transformer Engine's layers add their weight gradients to ``main_grad``, which is fp32, in the product itself.

    Otherwise each micro-batch's gradient is rounded to the weight's dtype first.
    """
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    children: Any = module.modules()
    for child in children:
        if isinstance(child, TransformerEngineBaseModule):
            child.fuse_wgrad_accumulation = True


def _with_experts(architecture: Architecture, stages: Sequence[int], stage: int) -> list[bool]:
    first = sum(stages[:stage])
    return [architecture.has_experts(layer) for layer in range(first, first + stages[stage])]


def build_policy(
    architecture: Architecture,
    layout: ModelLayout,
    options: ModelOptions,
    *,
    overlap: Overlap = OVERLAPPED,
    fused_head: bool = False,
    routing_replay: bool = False,
) -> Policy:
    """This rank's part of the policy with uninitialised weights, ready for training."""
    modules = build_modules(architecture, layout, options)
    routing = PolicyRouting(modules) if routing_replay else None
    return replace(wrap(architecture, modules, overlap, fused_head=fused_head), routing=routing)


def wrap(architecture: Architecture, modules: list[GPTModel], overlap: Overlap, *, fused_head: bool = False) -> Policy:
    """The modules wrapped for data parallelism with a distributed-optimizer gradient buffer in fp32.

    As Megatron's training loop does it, but nothing is aligned over pipeline stages: each stage reduces its gradients
    and gathers its weights when they are due there. Of the chunks of a stage only the first has several buckets.
    """
    config: Any = modules[0].config  # one for all
    chunks = [
        DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=overlap.overlap_grad_reduce,
                overlap_param_gather=overlap.overlap_param_gather,
                bucket_size=overlap.bucket_size or None,
            ),
            module=module,
            disable_bucketing=number > 0,
        )
        for number, module in enumerate(modules)
    ]
    config.finalize_model_grads_func = _finalize
    if overlap.overlap_grad_reduce:
        config.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
    if overlap.overlap_param_gather and modules[-1].post_process:
        _await_head(chunks[-1])
    return Policy(architecture, modules, chunks, fused_head)


def _await_head(chunk: DistributedDataParallel) -> None:
    """The last norm waits for the output layer's weight, which may be read without calling that layer."""
    module: Any = chunk.module
    weight = module.output_layer.weight
    if weight is not None:  # else it is the embedding's
        bucket_group = chunk.param_to_bucket_group[weight]
        module.decoder.final_layernorm.register_forward_pre_hook(lambda *_: bucket_group.finish_param_sync())


def build_reference(
    architecture: Architecture, layout: ModelLayout, options: ModelOptions, *, fused_head: bool = False
) -> Policy:
    """This rank's part of a frozen model with uninitialised weights: no gradients, no wrapper."""
    modules = build_modules(architecture, layout, options)
    for module in modules:
        module.requires_grad_(False)
    return Policy(architecture, modules, list(modules), fused_head)


def _finalize(model: list, num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction as a plain sum: the token count it offers to divide by is left out."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(
    policy: Policy,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip_grad: float,
    decay: Decay | None = None,
) -> MegatronOptimizer:
    """AdamW with its state sharded over the data-parallel ranks (biases and norms carry no weight decay)."""
    dtype = policy.modules[0].config.params_dtype
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=lr if decay is None else decay.min_lr,  # each group's own, which the schedule goes by
        weight_decay=weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=eps,
        clip_grad=clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=policy.chunks[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, policy.chunks)  # pyright: ignore[reportArgumentType]
    if policy.deterministic:
        deterministic.install_norm(optimizer)
    elif cpu_compat.device().type == "cpu":  # torch's other implementations round differently, this one is the fastest
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def build_scheduler(
    optimizer: MegatronOptimizer, *, lr: float, warmup_steps: int, weight_decay: float, decay: Decay | None = None
) -> OptimizerParamScheduler:
    """Linear warm-up over optimizer steps, then constant or falling.

    With w = max(1, warmup_steps), step i = 1, 2, ... has lr i / w up to i = w: the first one is never 0. Then r =
    (i - w) / (decay.steps + 1 - w) gives min_lr + (lr - min_lr) (1 - r), or for cosine (1 + cos(pi r)) / 2 of the
    difference, and from step decay.steps + 1 on min_lr.
    """
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=lr if decay is None else decay.min_lr,
        lr_warmup_steps=warmup_steps if decay is None else max(1, warmup_steps),
        lr_decay_steps=warmup_steps + 1 if decay is None else decay.steps + 1,
        lr_decay_style="constant" if decay is None else decay.schedule,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        override_opt_param_scheduler=False,
    )
    scheduler.step(1)
    return scheduler

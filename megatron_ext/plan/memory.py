"""What one GPU holds, item by item, in each phase of a step, for every pipeline rank.

    rollout   the trainer's state at rest, the engine's weights and its KV cache
    score     passes without gradient: old policy, reference, critic
    update    forward and backward: activations of all micro-batches in flight, the head, gradients

Weights, gradients and optimizer are exact (sizes.py). Activations are counted per saved tensor of a Transformer Engine
layer with flash attention (``saved_per_token``), the head per copy of the logits that is alive at once. What is gone
before the first tensor, and what the allocator loses, is assumed (device.py). Bytes throughout; bf16 has 2, fp32 4 per
element. Context-parallel ranks have a share of a micro-batch's tokens each; where gradients are summed and the
optimizer is sharded they count as data-parallel ones.

A colocated vLLM engine takes ``rollout.gpu_memory_utilization`` of the GPU's total memory, not of what is free: at its
start it refuses when less than that is free, measures weights, a prefill and its CUDA graphs, and makes the rest of the
share KV cache. Whatever else is on the GPU, this process's own context and communicators included, must fit beside the
share. Weights are streamed in before the KV cache is there again. While it sleeps it holds its CUDA graphs and nothing
else; saving happens then too, and needs less than an update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ext.config.schema import Config, ParallelConfig
from megatron_ext.model.architectures import Architecture
from megatron_ext.plan import device
from megatron_ext.plan.sizes import Buffers, Sharding, attention_widths, buffers, num_parameters, stage_parameters
from megatron_ext.rollout.registry import find_engine

Recompute = Literal["none", "mlp", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "mlp", "full")
IMBALANCE = 1.5  # assumed: tokens of the busiest expert-parallel rank over the mean
HEAD_CHUNK_BYTES = 1 << 29  # of logits that the fused head holds at once (ops/linear_policy_stats.py)
MAXIMA_SHARE = 1 / 32  # of bf16 logits: a 2-byte maximum for every 32 columns (ops/kernels/summary.py)
KEPT_TOKENS = 128  # assumed: that the sampler keeps for a token on average, where there is no top-k
BYTES_PER_KEPT_TOKEN = 128  # at their peak: id, token, column, masks, and fp64 sums (ops/support_stats.py)
EXCHANGE_PER_TOKEN = 4096  # 256 keys and logits a token position, sent and received (ops/nucleus.py)
PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Roles:
    """Which models and passes a method asks for besides the policy's own."""

    reference: bool = False
    critic: bool = False
    current: bool = False  # a pass without gradient before every update after the first
    old: bool = True  # one of the whole step before the first update, which otherwise measures its own mini-batch


def sharding(p: ParallelConfig) -> Sharding:
    return Sharding(
        tensor=p.tensor,
        expert=p.expert,
        expert_tensor=p.expert_tensor,
        data=p.data * p.context,
        expert_data=p.world // (p.pipeline * p.expert * p.expert_tensor),
    )


def stage_layers(a: Architecture, p: ParallelConfig) -> list[list[range]]:
    """Decoder layers of every pipeline rank, virtual stage by virtual stage."""
    count = p.pipeline * p.virtual
    sizes = p.stage_layers or [a.num_layers // count] * count
    starts = [sum(sizes[:stage]) for stage in range(count)]
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return [ranges[rank :: p.pipeline] for rank in range(p.pipeline)]


def rank_buffers(a: Architecture, p: ParallelConfig, rank: int, *, critic: bool = False) -> Buffers:
    """All parameters of pipeline rank ``rank`` (tensor, expert and data rank 0), one buffer a virtual stage."""
    total, s, chunks = Buffers(), sharding(p), stage_layers(a, p)[rank]
    for number, layers in enumerate(chunks):
        first = rank == 0 and number == 0
        last = rank == p.pipeline - 1 and number == len(chunks) - 1
        bucket = bucket_size(p) if rank == 0 and number == 0 else math.inf
        total += _stage_buffers(a, s, layers, first, last, critic, bucket)
    return total


@functools.cache  # of thousands of layouts that the search for a fit tries, most differ in something else
def _stage_buffers(
    a: Architecture, s: Sharding, layers: range, first: bool, last: bool, critic: bool, bucket: float
) -> Buffers:
    return buffers(stage_parameters(a, s, layers, first=first, last=last, critic=critic), s, bucket)


def bucket_size(p: ParallelConfig) -> float:
    """Elements at which Megatron-Core closes a bucket, on the first pipeline rank's first virtual stage.

    It goes by the data-parallel ranks without the context-parallel ones.
    """
    return (p.bucket_size or max(40_000_000, 1_000_000 * p.data)) if p.overlap_grad_reduce else math.inf


def saved_per_token(
    a: Architecture, p: ParallelConfig, layer: int, recompute: Recompute, *, fused_swiglu: bool
) -> float:
    """Elements that one decoder layer keeps for its backward, per token of the micro-batch.

    Kept in full, or sharded under sequence parallelism: the inputs of both norms and what the two linear layers behind
    them read. Sharded over the tensor ranks: the fused projection (the value is a view of it), query and key after
    rotation, the attention's output, and in the MLP gate and up and the product; unfused also silu(gate), a copy of up,
    and an expert's product before it is multiplied by its probability. Behind the dispatcher the ranks that cut an
    expert hold one another's tokens, each with its share of the columns.
    """
    D, (q, kv) = a.hidden_size, attention_widths(a)
    parts = p.tensor if p.sequence else 1
    if recompute == "full":
        return D / parts
    attention = (3 * q + 3 * kv + 2 * a.num_heads) / p.tensor  # flash keeps an fp32 sum per head
    experts = a.experts if a.has_experts(layer) else None
    if recompute == "mlp":
        return (3 if experts is None else 4) * D / parts + attention
    if experts is None:
        return 4 * D / parts + attention + (3 if fused_swiglu else 5) * a.ffn_size / p.tensor
    router = 6.5 * experts.num / parts  # fp32 logits, probabilities and their masked copy, a bool map
    columns = (3 if fused_swiglu else 6) * experts.ffn_size
    routed = IMBALANCE * experts.top_k * (D * p.expert_tensor + columns) / parts
    return 4 * D / parts + attention + router + routed


def in_flight(p: ParallelConfig, rank: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations pipeline rank ``rank`` holds at once, in units of all its layers."""
    if p.virtual == 1:
        return min(p.pipeline - rank, num_micro_batches)
    chunks = 2 * (p.pipeline - rank - 1) + (p.virtual - 1) * p.pipeline + 1  # warm-up of the interleaved schedule
    return min(chunks, num_micro_batches * p.virtual) / p.virtual


def activations(a: Architecture, config: Config, rank: int, recompute: Recompute, num_micro_batches: int) -> float:
    """Peak in the update: what all micro-batches in flight keep, one layer's own in full and as much in gradients."""
    p, element, tokens = config.parallel, element_bytes(config), rank_tokens(config)
    layers = [layer for chunk in stage_layers(a, p)[rank] for layer in chunk]
    fused = config.model.fusions.bias_activation
    kept = sum(saved_per_token(a, p, layer, recompute, fused_swiglu=fused) for layer in layers)
    return (
        tokens * element * (in_flight(p, rank, num_micro_batches) * kept + working_layer(a, config, layers, recompute))
    )


def rank_tokens(config: Config) -> int:
    """Of a full micro-batch, on each of the context-parallel ranks that share it."""
    return -(-config.train.micro_batch_tokens // config.parallel.context)


def working_layer(a: Architecture, config: Config, layers: Sequence[int], recompute: Recompute) -> float:
    """Elements per token of the layer that backward stands in: its gradients, and what was recomputed of it.

    Under context parallelism also the keys and values that go round, and their gradients: two buffers of each, in one
    of which the next rank's arrive.
    """
    p, fused = config.parallel, config.model.fusions.bias_activation
    largest = max((saved_per_token(a, p, layer, "none", fused_swiglu=fused) for layer in layers), default=0.0)
    exchanged = 8 * attention_widths(a)[1] / p.tensor if p.context > 1 else 0.0
    return largest * (1 if recompute == "none" else 2) + exchanged


def head(a: Architecture, config: Config, *, grad: bool) -> float:
    """Output layer and statistics on the last stage, for a micro-batch of response tokens only.

    Their hidden states are selected before the product, and backward writes the gradient into the logits: these are
    alive once.
    """
    p, element, tokens = config.parallel, element_bytes(config), rank_tokens(config)
    width = a.padded_vocab(p.tensor) // p.tensor
    weight, logits = width * a.hidden_size, tokens * width * element
    hidden = tokens * a.hidden_size * element * (2 + grad)  # gathered, selected, its gradient
    alive = min(HEAD_CHUNK_BYTES, logits) if config.model.fused_head else logits
    each = EXCHANGE_PER_TOKEN + kept_bytes(config)
    return hidden + tokens * each + alive * (1 + MAXIMA_SHARE) + weight * element * grad


def kept_bytes(config: Config) -> int:
    """A token's, of the tokens that the sampler kept, where they are replayed; those of the whole step lie on the host.

    All of top-k: the plan does not know what top-p and min-p leave of them.
    """
    rollout = config.rollout
    return (rollout.top_k or KEPT_TOKENS) * BYTES_PER_KEPT_TOKEN if rollout.replays_sampling else 0


def element_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def kv_bytes_per_token(a: Architecture, config: Config) -> int:
    return 2 * a.num_layers * attention_widths(a)[1] * element_bytes(config)


def engine_kv_bytes_per_token(a: Architecture, config: Config) -> float:
    """On one GPU of an engine: one with more ranks than key-value heads has each head several times."""
    return kv_bytes_per_token(a, config) / min(config.rollout.tensor_parallel_size, a.num_groups)


def engine_weights(a: Architecture, config: Config) -> float:
    """The rollout engine's own copy on one GPU."""
    return num_parameters(a) * element_bytes(config) / config.rollout.tensor_parallel_size


def engine_working(a: Architecture, config: Config) -> float:
    """What an engine needs beside weights and KV cache: activations of a prefill, or logits of a step."""
    r, element = config.rollout, element_bytes(config)
    wide = a.experts.ffn_size * a.experts.top_k if a.experts else a.ffn_size
    tokens = find_engine(r).prefill_tokens or r.batch_size * config.data.max_prompt_tokens
    prefill = tokens * (3 * wide / r.tensor_parallel_size + 3 * a.hidden_size) * element
    return max(prefill, r.batch_size * a.vocab_size * 24)  # 24: six fp32 copies of a step's logits while sampling


def engine_cache(a: Architecture, config: Config, gpu_memory: float) -> float:
    """KV cache on one GPU of an engine that takes a share: what it leaves beside weights, work and graphs."""
    needed = engine_weights(a, config) + engine_working(a, config) + device.graph_bytes(config)
    return config.rollout.gpu_memory_utilization * gpu_memory - needed


def num_engines(config: Config) -> int:
    """Copies of the model that sample."""
    return find_engine(config.rollout).num_engines(config)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank's GPU: ``phases[phase][item]``."""

    rank: int
    buffers: Buffers
    phases: dict[str, dict[str, float]]

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def worst_phase(self) -> str:
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.worst_phase)


def rank_memory(
    a: Architecture, config: Config, roles: Roles, rank: int, *, gpu_memory: float, num_micro_batches: int
) -> RankMemory:
    """Every item of every phase. What an engine holds, and when, is what it declares (rollout/engine_spec.py)."""
    spec = find_engine(config.rollout)
    p, element = config.parallel, element_bytes(config)
    own, last = rank_buffers(a, p, rank), rank == p.pipeline - 1
    gone = {"context": device.CONTEXT, "communicators": device.communicator_bytes(a, config)}
    if graphs := device.graph_bytes(config):
        gone["CUDA graphs"] = graphs
    state = gone | trained_bytes(own, element)
    if roles.critic:
        state["critic"] = sum(trained_bytes(rank_buffers(a, p, rank, critic=True), element).values())
    reference = {"reference": own.parameters * element} if roles.reference else {}
    resident = {} if config.model.offload_reference else reference
    engine = {"rollout weights": engine_weights(a, config)} if spec.colocated else {}
    asleep = {} if spec.sleeps else dict(engine)
    layers = [layer for chunk in stage_layers(a, p)[rank] for layer in chunk]
    scored = rank_tokens(config) * element * working_layer(a, config, layers, "none")
    score = {"activations": scored} | _head_item(a, config, last, grad=False)
    update = {"activations": activations(a, config, rank, config.model.recompute, num_micro_batches)}
    if config.rollout.routing_replay:
        kept = 1.0 if config.model.recompute == "none" else in_flight(p, rank, num_micro_batches)
        score["replayed experts"] = replayed_experts(a, config, layers)
        update["replayed experts"] = kept * replayed_experts(a, config, layers)
    update |= _head_item(a, config, last, grad=True)
    if spec.colocated:
        cache = max(0.0, engine_cache(a, config, gpu_memory)) if spec.takes_share else kv_cache(a, config)
        engine |= {"rollout work": engine_working(a, config), "KV cache": cache}
    rollout = state | resident | engine
    if config.model.offload_optimizer:
        rollout |= {"gradients": 0.0, "optimizer": 0.0}
        if roles.critic:
            rollout["critic"] = rank_buffers(a, p, rank, critic=True).padded * element
    phases = {
        "rollout": rollout,
        "score": state | reference | asleep | score | _fragments(score),
        "update": state | resident | asleep | update | _fragments(update),
    }
    return RankMemory(rank, own, phases)


def replayed_experts(a: Architecture, config: Config, layers: Sequence[int]) -> float:
    """Of one micro-batch on a rank with ``layers``: 2 bytes an expert of each token (model/routing.py).

    With recomputation every micro-batch in flight keeps its own. Host memory holds those of a whole step's tokens, for
    all layers: 1 byte an expert up to 256 experts, else 2, and 2 again where they are packed.
    """
    p, routed = config.parallel, sum(a.has_experts(layer) for layer in layers)
    top_k = 0 if a.experts is None else a.experts.top_k
    return rank_tokens(config) / (p.tensor if p.sequence else 1) * routed * top_k * 2


def trained_bytes(own: Buffers, element: int) -> dict[str, float]:
    """Weights, fp32 gradients, and Adam's two moments with fp32 master weights (none beside fp32 weights)."""
    masters = 4 if element == 2 else 0
    return {"weights": own.padded * element, "gradients": own.padded * 4, "optimizer": own.owned * (8 + masters)}


def kv_cache(a: Architecture, config: Config) -> float:
    """Of an engine that takes no share: every sequence of a batch at full length, and a layer's copy while it grows."""
    sequences = config.rollout.batch_size * config.longest_sampled
    return sequences * kv_bytes_per_token(a, config) * (1 + 1 / a.num_layers)


def kv_capacity(a: Architecture, config: Config, cache: float) -> int:
    """Full-length sequences that fit in ``cache`` bytes on each GPU of an engine."""
    return max(0, int(cache // (config.longest_sampled * engine_kv_bytes_per_token(a, config))))


def _head_item(a: Architecture, config: Config, last: bool, *, grad: bool) -> dict[str, float]:
    return {"head and statistics": head(a, config, grad=grad)} if last else {}


def _fragments(anew: dict[str, float]) -> dict[str, float]:
    return {"fragmentation": device.FRAGMENTATION * sum(anew.values())}

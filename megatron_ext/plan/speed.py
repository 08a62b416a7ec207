"""How long a step takes, from stated rates. An estimate for choosing a layout, not a promise.

train     2 operations per active weight and token forward, 4 backward, plus attention's, at ``mfu`` of the peak;
          recomputation and the fused head repeat their part of the forward; pipeline stages idle (p - 1) / (m v); keys
          and values go round the context-parallel ranks beside attention, which takes longer; ``score`` are the
          passes before the first update, ``update`` the updates and a moved policy's own passes
exchange  gradients in fp32 reduced, weights gathered, over data- and context-parallel ranks, once an update
rollout   a decoding step of an engine reads the weights and the KV cache of all running sequences once, at ``decode``
          of the memory bandwidth, and costs at least ``launch_s`` per layer; at any time they are half grown, and no
          more run than its cache holds
sync      every weight once through the host, as the streamed export does

Rewards, validation and checkpoints are not estimated. measured.py puts what a run measured in the place of the rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ext.config.schema import Config
from megatron_ext.model.architectures import Architecture
from megatron_ext.plan import memory
from megatron_ext.plan.memory import Roles
from megatron_ext.plan.sizes import active_parameters, attention_widths, num_parameters
from megatron_ext.rollout.registry import find_engine


@dataclass(frozen=True)
class Rates:
    """What one GPU and its links do per second. ``source`` says where the numbers come from."""

    flops: float  # dense bf16
    bandwidth: float  # bytes, device memory
    node_link: float  # bytes a direction, to the GPUs of the node
    network: float  # bytes a direction, to other nodes, per GPU
    mfu: float = 0.40
    mfu_experts: float = 0.20
    decode: float = 0.5
    host_link: float = 20e9
    launch_s: float = 8e-4
    source: str = ""


COMMON = (
    "mfu .40: Megatron-Core reports up to .47 on H100; mfu_experts .20, decode .5, host link 20 GB/s, launch .8 ms a "
    "layer (embedded engine; a tenth under vLLM's CUDA graphs): assumed; --measured takes those of a run"
)
_NIC_200, _NIC_400 = "one 200 Gb/s NIC per GPU (DGX A100)", "one 400 Gb/s NIC per GPU (DGX H100, B200)"
# NVIDIA's data sheets of the SXM modules; dense bf16, half of what they give with sparsity; NVLink's total halved
RATES = {
    "a100": Rates(312e12, 2.039e12, 300e9, 25e9, source=f"A100 80GB SXM data sheet, {_NIC_200}; {COMMON}"),
    "a800": Rates(312e12, 2.04e12, 200e9, 25e9, source=f"A800 SXM data sheet, {_NIC_200}; {COMMON}"),
    "h20": Rates(148e12, 4.0e12, 450e9, 50e9, source=f"H20 data sheet, {_NIC_400}; {COMMON}"),
    "h100": Rates(989e12, 3.35e12, 450e9, 50e9, source=f"H100 SXM data sheet, {_NIC_400}; {COMMON}"),
    "h800": Rates(989e12, 3.35e12, 200e9, 50e9, source=f"H800 SXM data sheet, {_NIC_400}; {COMMON}"),
    "h200": Rates(989e12, 4.8e12, 450e9, 50e9, source=f"H200 SXM data sheet, {_NIC_400}; {COMMON}"),
    "b200": Rates(2250e12, 8.0e12, 900e9, 50e9, source=f"HGX and DGX B200 data sheets, {_NIC_400}; {COMMON}"),
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a mean sequence."""

    prompt: float
    response: float

    @property
    def total(self) -> float:
        return self.prompt + self.response


def default_lengths(config: Config) -> Lengths:
    """Assumed where nothing is known: short prompts, and responses that end half-way on average."""
    return Lengths(min(256, config.data.max_prompt_tokens), config.rollout.max_response_tokens / 2)


def forward_flops(a: Architecture, context: float) -> float:
    """Operations of one token's forward in a sequence of ``context`` tokens (causal: half of it on average)."""
    return 2 * active_parameters(a) + 2 * a.num_layers * attention_widths(a)[0] * context


def step_seconds(
    a: Architecture, config: Config, roles: Roles, rates: Rates, lengths: Lengths, *, gpu_memory: float
) -> dict[str, float]:
    """Seconds of each phase of one step. ``gpu_memory``: bytes of one GPU."""
    p, r, t = config.parallel, config.rollout, config.train
    responses = r.prompts * r.samples
    updates = r.prompts // t.mini_batch_prompts
    tokens = responses * lengths.total
    once = tokens * forward_flops(a, lengths.total)
    speed = rates.flops * (rates.mfu_experts if a.experts else rates.mfu) * p.world
    micro_batches = max(1, math.ceil(tokens / updates / p.data / t.micro_batch_tokens))
    bubble = 1 + (p.pipeline - 1) / (micro_batches * p.virtual)
    old = 1 if roles.old else (updates - 1) / updates
    passes = old + roles.reference + roles.critic
    has_pass = roles.current and (micro_batches > 1 or p.pipeline > 1)  # else the update's own forward measures it
    current = has_pass * (updates - 1) / updates
    backward = 3 + repeated_share(a, config)
    return {
        "rollout": rollout_seconds(a, config, rates, lengths, gpu_memory=gpu_memory),
        "score": passes * once / speed * bubble,
        "update": ((1 + roles.critic) * backward + current) * once / speed * bubble,
        "gradient exchange": (1 + roles.critic) * updates * exchange_seconds(a, config, rates),
        "weight sync": num_parameters(a) * memory.element_bytes(config) / rates.host_link,
    }


def repeated_share(a: Architecture, config: Config) -> float:
    """Part of the forward that backward repeats: recomputed layers, and the fused head's product."""
    active, output = active_parameters(a), a.vocab_size * a.hidden_size
    q, kv = attention_widths(a)
    attention = a.num_layers * a.hidden_size * (2 * q + 2 * kv)
    layers = {"none": 0, "mlp": active - output - attention, "full": active - output}[config.model.recompute]
    return (layers + output * config.model.fused_head) / active


def exchange_seconds(a: Architecture, config: Config, rates: Rates) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of weights on the pipeline rank with the most parameters."""
    p = config.parallel
    own = max(memory.rank_buffers(a, p, rank).padded for rank in range(p.pipeline))
    link = rates.network if p.nodes > 1 else rates.node_link
    ranks = p.data * p.context
    return own * (4 + memory.element_bytes(config)) * (ranks - 1) / ranks / link


def rollout_seconds(a: Architecture, config: Config, rates: Rates, lengths: Lengths, *, gpu_memory: float) -> float:
    """An engine decodes batch after batch, each to its longest response, or replaces finished sequences at once."""
    decoding = Decoding.of(a, config, lengths, gpu_memory)
    return decoding.steps * max(decoding.bytes / (rates.bandwidth * rates.decode), decoding.launches * rates.launch_s)


@dataclass(frozen=True)
class Decoding:
    """What an engine does in a rollout: its decoding steps, and of each, on average, the bytes that a GPU reads and the
    layers that are launched as ``Rates.launch_s`` counts them.

    Where a finished sequence is replaced at once, lengths are taken to be spread evenly up to twice their mean m: such
    sequences have ``prompt + 2 m / 3`` tokens on average while they run. A batch that is not refilled grows until its
    longest response ends.
    """

    steps: float
    bytes: float
    launches: float

    @classmethod
    def of(cls, a: Architecture, config: Config, lengths: Lengths, gpu_memory: float) -> Decoding:
        r, spec = config.rollout, find_engine(config.rollout)
        responses = r.prompts * r.samples / memory.num_engines(config)  # of one engine
        weights, kv = memory.engine_weights(a, config), memory.engine_kv_bytes_per_token(a, config)
        if not spec.continuous_batching:
            batches = math.ceil(responses / r.batch_size)
            cached = responses / batches * (lengths.prompt + r.max_response_tokens / 2)
            return cls(batches * r.max_response_tokens, weights + cached * kv, a.num_layers)
        running = lengths.prompt + 2 * lengths.response / 3  # tokens of a sequence
        room = memory.engine_cache(a, config, gpu_memory) / (running * kv) if spec.takes_share else math.inf
        batch = min(responses, r.batch_size, max(1.0, room))
        steps = max(responses * lengths.response / batch, r.max_response_tokens)
        cached = responses * lengths.response / steps * running
        return cls(steps, weights + cached * kv, a.num_layers / 10)

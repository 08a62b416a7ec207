"""A recipe's plan: groups, tokens, memory of the worst GPU, time; and the nearest layout where it does not fit."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.config.checks import layout_faults, read_hf_config
from megatron_ext.config.schema import Config
from megatron_ext.model.architectures import Architecture, find_family, read_architecture
from megatron_ext.plan import device, memory, speed
from megatron_ext.plan.memory import RankMemory, Roles
from megatron_ext.plan.sizes import active_parameters, num_parameters
from megatron_ext.plan.speed import Lengths, Rates
from megatron_ext.rollout.registry import find_engine

LONG = 16384  # tokens of a sequence from which on other context-parallel sizes are tried


@dataclass(frozen=True)
class Plan:
    """What a recipe needs. ``ranks`` holds one pipeline rank's memory each."""

    config: Config
    architecture: Architecture
    roles: Roles
    gpu_memory: float
    num_micro_batches: int
    ranks: list[RankMemory]
    rates: Rates
    lengths: Lengths

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """Of a step, by phase."""
        return speed.step_seconds(
            self.architecture, self.config, self.roles, self.rates, self.lengths, gpu_memory=self.gpu_memory
        )

    @property
    def worst(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def kv_sequences(self) -> int:
        """Full-length sequences that one engine decodes at once."""
        if not find_engine(self.config.rollout).takes_share:
            return self.config.rollout.batch_size
        cache = memory.engine_cache(self.architecture, self.config, self.gpu_memory)
        return memory.kv_capacity(self.architecture, self.config, cache)

    @property
    def free(self) -> float:
        """Bytes left on the worst GPU in its worst phase."""
        return self.gpu_memory - self.worst.peak

    @property
    def fits(self) -> bool:
        return self.free >= device.MARGIN and self.kv_sequences > 0

    @property
    def rolls_out_beside(self) -> bool:
        """Whether a later step's rollout runs beside the step's passes and updates."""
        return self.config.rollout.max_lag > 0 and find_engine(self.config.rollout).beside_training

    @property
    def step_s(self) -> float:
        """Seconds of a step: the sum of its phases, but of a rollout beside training and of training the longer."""
        hidden = 0.0
        if self.rolls_out_beside:
            train = sum(self.seconds[phase] for phase in ("score", "update", "gradient exchange"))
            hidden = min(self.seconds["rollout"], train)
        return sum(self.seconds.values()) - hidden

    def activations(self) -> dict[str, float]:
        """Peak of the activations by recompute mode, on the pipeline rank where it is highest."""
        ranks = range(self.config.parallel.pipeline)
        return {
            mode: max(
                memory.activations(self.architecture, self.config, rank, mode, self.num_micro_batches) for rank in ranks
            )
            for mode in memory.RECOMPUTE
        }

    def groups(self) -> dict[str, int]:
        p, s = self.config.parallel, memory.sharding(self.config.parallel)
        groups = {"world": p.world, "nodes": p.nodes, "data": p.data, "pipeline": p.pipeline, "virtual": p.virtual}
        groups["tensor"] = p.tensor
        if p.context > 1:
            groups["context"] = p.context
        if self.architecture.experts:
            groups |= {"expert": p.expert, "expert_tensor": p.expert_tensor, "expert_data": s.expert_data}
        return groups

    def tokens(self) -> dict[str, int]:
        r, t = self.config.rollout, self.config.train
        return {
            "prompts": r.prompts,
            "responses": r.prompts * r.samples,
            "updates": r.prompts // t.mini_batch_prompts,
            "responses_per_update": t.mini_batch_prompts * r.samples,
            "longest_sequence": self.config.longest_sequence,
            "most_tokens": r.prompts * r.samples * self.config.longest_sequence,
            "micro_batch_tokens": t.micro_batch_tokens,
            "micro_batch_tokens_per_rank": memory.rank_tokens(self.config),
            "micro_batches_per_update": self.num_micro_batches,
        }

    def as_dict(self) -> dict[str, Any]:
        worst = self.worst
        return {
            "recipe": self.config.name,
            "model": self.config.model.path,
            "parameters": num_parameters(self.architecture),
            "active_parameters": active_parameters(self.architecture),
            "groups": self.groups(),
            "tokens": self.tokens(),
            "roles": asdict(self.roles),
            "gpu_memory": self.gpu_memory,
            "free": self.free,
            "communicators": device.communicators(self.architecture, self.config),
            "fits": self.fits,
            "worst_rank": worst.rank,
            "worst_phase": worst.worst_phase,
            "memory": worst.phases,
            "peak_by_rank": [rank.peak for rank in self.ranks],
            "activations": self.activations(),
            "kv_sequences": self.kv_sequences,
            "seconds": self.seconds,
        }


def make_plan(config: Config, roles: Roles, *, rates: Rates, gpu_memory: float, lengths: Lengths | None = None) -> Plan:
    """The plan of a configuration whose layout is valid (config/schema.py::layout_faults)."""
    a = read_architecture(read_hf_config(config.model.path), find_family(config.model.family))
    lengths = lengths or speed.default_lengths(config)
    per_rank = config.train.mini_batch_prompts * config.rollout.samples // config.parallel.data
    longest = config.parallel.padded(config.longest_sequence)
    micro_batches = math.ceil(per_rank / (config.train.micro_batch_tokens // longest))
    ranks = [
        memory.rank_memory(a, config, roles, rank, gpu_memory=gpu_memory, num_micro_batches=micro_batches)
        for rank in range(config.parallel.pipeline)
    ]
    return Plan(config, a, roles, gpu_memory, micro_batches, ranks, rates, lengths)


def nearest_fit(plan: Plan, *, rates: Rates, lengths: Lengths | None = None) -> tuple[list[str], Plan] | None:
    """The overrides that change least and fit, with their plan; the fastest among equals. None: no layout fits."""
    found = []
    for cost, changes in sorted(_variants(plan), key=lambda variant: variant[0]):
        if found and cost > found[0][0]:
            break
        config = _with(plan.config, changes)
        if layout_faults(config):
            continue
        other = make_plan(config, plan.roles, rates=rates, gpu_memory=plan.gpu_memory, lengths=lengths)
        if other.fits:
            found.append((cost, changes, other))
    if not found:
        return None
    _, changes, other = min(found, key=lambda variant: variant[2].step_s)
    return [f"{key}={_toml(value)}" for key, value in changes.items()], other


def _variants(plan: Plan) -> Iterator[tuple[float, dict[str, Any]]]:
    """Combinations of other values with the number of steps that each is away."""
    c, p = plan.config, plan.config.parallel
    least = p.padded(c.longest_sequence)
    knobs: list[list[tuple[float, dict[str, Any]]]] = [
        _ladder("model.recompute", c.model.recompute, memory.RECOMPUTE),
        _ladder("model.fused_head", c.model.fused_head, (False, True)),
        _ladder("parallel.tensor", p.tensor, (1, 2, 4, 8)),
        _ladder("parallel.pipeline", p.pipeline, (1, 2, 4, 8)) if not p.stage_layers else [(0, {})],
        _ladder("parallel.context", p.context, (1, 2, 4, 8)) if least >= LONG else [(0, {})],
        _ladder("parallel.expert", p.expert, (1, 2, 4, 8, 16, 32)) if plan.architecture.experts else [(0, {})],
        [(0, {})] + ([(0.5, {"train.micro_batch_tokens": least})] if c.train.micro_batch_tokens > least else []),
        [(0, {})] + ([(0.5, {"model.offload_reference": True})] if plan.roles.reference else []),
    ]
    spec = find_engine(c.rollout)
    if spec.colocated and not spec.takes_share:
        sizes = tuple(c.rollout.batch_size >> shift for shift in range(8) if c.rollout.batch_size >> shift)
        knobs.append([(0.5 * cost, change) for cost, change in _ladder("rollout.batch_size", sizes[0], sizes)])
    elif spec.colocated:
        shares = _ladder(
            "rollout.gpu_memory_utilization", c.rollout.gpu_memory_utilization, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
        )
        knobs.append([(0.5 * cost, change) for cost, change in shares])
    for choice in itertools.product(*knobs):
        changes = {key: value for _, change in choice for key, value in change.items()}
        sequence = changes.get("parallel.tensor", p.tensor) > 1
        if "parallel.tensor" in changes and sequence != p.sequence:
            changes["parallel.sequence"] = sequence
        cut = p.model_copy(update={"context": changes.get("parallel.context", p.context)})
        needed = cut.padded(c.longest_sequence)
        # no step away: a layout is not valid whose micro-batch cannot hold the longest sequence with its padding
        if "train.micro_batch_tokens" in changes or c.train.micro_batch_tokens < needed:
            changes["train.micro_batch_tokens"] = needed
        yield sum(cost for cost, _ in choice), changes


def _ladder(key: str, now: Any, values: tuple[Any, ...]) -> list[tuple[float, dict[str, Any]]]:
    if now not in values:
        return [(0, {})]
    own = values.index(now)
    return [(abs(i - own), {key: value} if i != own else {}) for i, value in enumerate(values)]


def _with(config: Config, changes: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

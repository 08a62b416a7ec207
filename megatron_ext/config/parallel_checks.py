"""Which layouts a model fits: sizes of its ``config.json`` against the ``[parallel]`` section, no torch imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ext.config.schema import ParallelConfig

MOST_STAGES = 256  # that a message spells out; no model has more layers


def num_experts(hf: dict[str, Any]) -> int | None:
    """Of a layer of the model whose ``config.json`` is ``hf``; None for a dense one."""
    return hf.get("num_experts") or hf.get("num_local_experts")


def model_faults(hf: dict[str, Any], p: ParallelConfig) -> list[str]:
    """A line for each rule the layout breaks: rule, values, nearest valid choice."""
    heads = hf["num_attention_heads"]
    sizes = {"attention heads": heads, "key-value heads": hf.get("num_key_value_heads") or heads}
    if "intermediate_size" in hf:
        sizes["feed-forward columns"] = hf["intermediate_size"]
    faults = [
        f"parallel.tensor: {p.tensor} does not divide the model's {count} {what}; valid sizes are {_divisors(count)}"
        for what, count in sizes.items()
        if count % p.tensor
    ]
    return faults + _stage_faults(hf["num_hidden_layers"], p) + _expert_faults(hf, p)


def engine_faults(hf: dict[str, Any], shared: int, *, key: str = "rollout.tensor_parallel_size") -> list[str]:
    """A line, of ``key``, where ``shared`` GPUs cannot share an engine: each takes as many heads and no part of one."""
    heads = hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    if heads % shared == 0 and (groups % shared == 0 or shared % groups == 0):
        return []
    valid = [n for n in _divisors(heads) if groups % n == 0 or n % groups == 0]
    return [
        f"{key}: {shared} does not divide the model's {heads} attention heads and {groups} "
        f"key-value heads; valid sizes are {valid}"
    ]


def nearest_divisor(number: int, wanted: int) -> int:
    return min(_divisors(number), key=lambda n: (abs(n - wanted), n))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 256) + 1) if number % n == 0]


def _stage_faults(layers: int, p: ParallelConfig) -> list[str]:
    faults, stages = [], p.pipeline * p.virtual
    if p.virtual > 1 and p.pipeline == 1:
        faults.append(
            f"parallel.virtual: {p.virtual} stages on each pipeline rank need parallel.pipeline > 1, found 1; set "
            "parallel.virtual = 1"
        )
    named = f"parallel.pipeline: {p.pipeline}" + (f" x parallel.virtual {p.virtual} = {stages}" * (p.virtual > 1))
    if p.stage_layers and (len(p.stage_layers) != stages or sum(p.stage_layers) != layers):
        faults.append(
            f"parallel.stage_layers: found {len(p.stage_layers)} numbers that sum to {sum(p.stage_layers)}, expected "
            f"one for each of {stages} stages (pipeline x virtual) with the model's {layers} layers in sum; "
            f"set {_even(layers, stages)}"
        )
    elif not p.stage_layers and layers % stages:
        faults.append(
            f"{named} does not divide the model's {layers} layers; nearest valid is "
            f"{nearest_divisor(layers, stages)}, or set {_even(layers, stages)}"
        )
    return faults


def _even(layers: int, stages: int) -> str:
    """As even as it goes, with fewer layers on the first and last stages: they hold the embedding and the head."""
    if stages > min(layers, MOST_STAGES):
        return f"parallel.pipeline x parallel.virtual to at most {min(layers, MOST_STAGES)}"
    least, more = divmod(layers, stages)
    first = (stages - more) // 2
    return f"parallel.stage_layers = {[least + (first <= stage < first + more) for stage in range(stages)]}"


def _expert_faults(hf: dict[str, Any], p: ParallelConfig) -> list[str]:
    experts = num_experts(hf)
    if experts is None:
        return [
            f"parallel.{field}: the model has no experts, found {size}; set parallel.{field} = 1"
            for field, size in (("expert", p.expert), ("expert_tensor", p.expert_tensor))
            if size > 1
        ]
    faults = []
    for field, size, what, count in (
        ("expert", p.expert, "experts", experts),
        ("expert_tensor", p.expert_tensor, "columns of an expert", hf.get("moe_intermediate_size")),
    ):
        if count is not None and count % size:  # an unknown family is refused by its name
            faults.append(
                f"parallel.{field}: {size} does not divide the model's {count} {what}; nearest valid is "
                f"{nearest_divisor(count, size)}"
            )
    copies = p.expert * p.expert_tensor * p.pipeline
    if p.world % copies:
        faults.append(
            f"parallel.expert: expert {p.expert} x expert_tensor {p.expert_tensor} x pipeline {p.pipeline} = {copies} "
            f"does not divide the world of {p.world} ranks; nearest valid world is "
            f"{max(1, round(p.world / copies)) * copies}"
        )
    if p.tensor > 1 and not p.sequence:
        faults.append(
            f"parallel.sequence: experts under parallel.tensor {p.tensor} need sequence parallelism, found false; set "
            "parallel.sequence = true"
        )
    return faults

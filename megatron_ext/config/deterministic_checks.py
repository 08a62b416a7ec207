"""What ``model.deterministic`` covers: sizes of ``config.json`` against the recipe, no torch imported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_ext.config.parallel_checks import num_experts

if TYPE_CHECKING:
    from megatron_ext.config.schema import Config

MOST = 8  # blocks, and so tensor-parallel ranks


def num_blocks(*sizes: int) -> int:
    """Into how many blocks all sizes are cut: the largest power of two, at most MOST, that divides each."""
    return math.gcd(MOST, *sizes)


def deterministic_faults(hf: dict[str, Any], config: Config) -> list[str]:
    """A line for each thing of the recipe that ``model.deterministic`` does not cover."""
    model, p = config.model, config.parallel
    if not model.deterministic:
        return []
    heads = hf["num_attention_heads"]
    sizes = {"attention heads": heads, "key-value heads": hf.get("num_key_value_heads") or heads}
    sizes |= {"feed-forward columns": hf.get("intermediate_size", MOST), "tokens": hf.get("vocab_size", MOST)}
    most = num_blocks(*sizes.values())
    faults = [
        f"{key}: model.deterministic covers {covered} alone, found {found}; set {key} = {covered}"
        for key, found, covered in (
            ("model.dtype", model.dtype, "float32"),
            ("parallel.pipeline", p.pipeline, 1),
            ("parallel.context", p.context, 1),
            ("parallel.sequence", str(p.sequence).lower(), "false"),
        )
        if found != covered
    ]
    if p.world > p.tensor * p.context * p.pipeline:
        faults.append(
            f"parallel: model.deterministic covers one copy of the model, found {p.data} data-parallel ones; set "
            f"parallel.ranks_per_node = {p.tensor} and parallel.nodes = 1"
        )
    if most % p.tensor:
        cut = ", ".join(f"{count} {what}" for what, count in sizes.items())
        valid = [size for size in (1, 2, 4, 8) if most % size == 0]
        faults.append(
            f"parallel.tensor: model.deterministic cuts the model's {cut} into {most} blocks, found {p.tensor} ranks; "
            f"valid sizes are {valid}"
        )
    if num_experts(hf):
        faults.append("model.deterministic: covers no mixture of experts; set model.deterministic = false")
    if model.fused_head and sizes["tokens"] % MOST:
        faults.append(
            f"model.fused_head: with model.deterministic it needs a vocabulary divisible by {MOST}, found "
            f"{sizes['tokens']}; set model.fused_head = false"
        )
    return faults

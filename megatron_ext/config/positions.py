"""How many tokens of prompt and response a model was made for, from its ``config.json``. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRETCHED = ("linear", "dynamic", "yarn")  # rope types whose factor multiplies the positions; others have theirs stated


def max_positions(hf: Mapping[str, Any]) -> int | None:
    """``max_position_embeddings``, or what the rope scaling makes of it: ``factor`` times as many; None: not stated.

    Under yarn the factor is of ``original_max_position_embeddings``, where that is stated.
    """
    positions = hf.get("max_position_embeddings")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if not isinstance(positions, int) or kind not in STRETCHED or not isinstance(factor, int | float):
        return positions
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(positions, int((original or positions) * factor))

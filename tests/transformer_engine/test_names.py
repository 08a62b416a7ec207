"""The parameter mapping between Hugging Face and Megatron is held against Transformer Engine's own source.

Megatron-Core builds its GPTModel from its Transformer Engine layer spec; names, shapes and locations in a checkpoint
are those of these modules, not of a list written here.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.checks import read_hf_config
from megatron_ext.model import architectures
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.param_mapping import ParamMapping, mappings
from megatron_ext.model.tp_sharding import Vocabulary
from tests import tiny
from tests.transformer_engine.models import moe_of_16
from tests.transformer_engine.running import inside

KINDS = ["qwen2", "qwen2 tied", "qwen3", "llama", "qwen3_moe_mixed", "16 experts"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 1": (1, {}),
    "TP 2": (2, {"tensor": 2, "sequence": True, "expert_tensor": 2}),
    "EP 2": (2, {"expert": 2}),
}


@functools.cache
def directory(kind: str) -> Path:
    if kind == "16 experts":
        return moe_of_16()
    name, *tied = kind.split()
    return tiny.hf_model(name, bool(tied))[1]


@functools.cache
def found(layout: str) -> list[list[dict[str, Any]]]:
    """For each rank and kind what inside.py found."""
    world, options = LAYOUTS[layout]
    return inside("names", world=world, cases=[(str(directory(kind)), options) for kind in KINDS])


def expected(kind: str, layout: str, rank: int) -> tuple[Architecture, list[ParamMapping], int]:
    """The architecture, this rank's mappings, and over how many ranks its tensors are sharded."""
    world, options = LAYOUTS[layout]
    architecture = architectures.read_architecture(read_hf_config(directory(kind)))
    experts = None
    if architecture.experts is not None and "expert" in options:
        own = architecture.experts.num // world
        experts = range(rank * own, (rank + 1) * own)
    numbers = range(architecture.num_layers)
    return architecture, mappings(architecture, numbers, first=True, last=True, experts=experts, fused=True), world


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_mapping(kind: str, layout: str) -> None:
    for rank, models in enumerate(found(layout)):
        model = models[KINDS.index(kind)]
        assert "transformer_engine.pytorch.module.layernorm_linear" in model["classes"]
        assert "megatron_ext.model.layers" not in model["classes"]  # no stand-in of ours
        _, own, _ = expected(kind, layout, rank)
        assert model["parameters"].keys() == {mapping.megatron for mapping in own}
        tensor = LAYOUTS[layout][1].get("tensor", 1)
        for mapping in own:
            full = padded(mapping, tensor)
            parts = math.prod(full) // math.prod(model["parameters"][mapping.megatron])
            shard = not mapping.megatron.endswith(("norm.weight", "norm_weight", "router.weight"))
            assert parts == (tensor if shard else 1), mapping.megatron


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_them_where_the_mapping_says(kind: str, layout: str) -> None:
    """Every tensor under the key, of the global shape and at the index of its mapping; together they are the model."""
    tensor = LAYOUTS[layout][1].get("tensor", 1)
    covered: dict[tuple, set] = {}
    for rank, models in enumerate(found(layout)):
        architecture, own, _ = expected(kind, layout, rank)
        by_location = {(mapping.key, mapping.index): mapping for mapping in own if not duplicate(architecture, mapping)}
        for key, global_shape, offset, local_shape in models[KINDS.index(kind)]["tensors"]:
            index = tuple(offset[: len(offset) - len(local_shape)])
            mapping = by_location[key, index]
            assert tuple(global_shape) == (*mapping.stacked, *padded(mapping, tensor)), key
            covered.setdefault((key, index), set()).add((tuple(offset), tuple(local_shape)))
        assert all(location in covered for location in by_location)
    _, everything, _ = expected(kind, "TP 1", 0)
    sizes = {(mapping.key, mapping.index): math.prod(padded(mapping, tensor)) for mapping in everything}
    assert covered.keys() == sizes.keys()
    for location, pieces in covered.items():
        assert sum(math.prod(shape) for _, shape in pieces) == sizes[location], location


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_else_in_a_state_dict_is_an_extra_state(kind: str, layout: str) -> None:
    for models in found(layout):
        model = models[KINDS.index(kind)]
        assert model["others"] and all(name.endswith("._extra_state") for name in model["others"])
        assert all(".".join(name.split(".")[:-1]) for name in model["objects"])


def test_sixteen_experts_have_sixteen_extra_states() -> None:
    """In a checkpoint a grouped layer's state is taken apart: what checkpoint.py must leave out."""
    objects = found("TP 1")[0][KINDS.index("16 experts")]["objects"]
    for layer in range(2):
        prefix = f"decoder.layers.{layer}.mlp.experts.linear_fc1._extra_state"
        assert {name for name in objects if name.startswith(prefix)} == {
            prefix,
            *(f"{prefix}{expert}" for expert in range(1, 16)),
        }


def padded(mapping: ParamMapping, tensor: int) -> tuple[int, ...]:
    """The parameter's shape in the unsharded model, its vocabulary padded as under that many ranks."""
    if isinstance(mapping.sharding, Vocabulary):
        return (-(-mapping.shape[0] // tensor) * tensor, *mapping.shape[1:])
    return mapping.shape


def duplicate(architecture: Architecture, mapping: ParamMapping) -> bool:
    return architecture.tied and mapping.megatron == "output_layer.weight"


@pytest.mark.parametrize("on", [True, False])
def test_fusions_reach_megatron_and_the_layers(on: bool) -> None:
    path = str(directory("16 experts"))
    [[model]] = [found("TP 1")[0][-1:]] if on else inside("names", cases=[(path, {"fusions": False})])
    assert [model["rope"], model["bias_activation"], model["moe_permute"]] == [on] * 3
    assert len(model["accumulates"]) == 2 * 4 and set(model["accumulates"]) == {on}

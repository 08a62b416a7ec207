"""Streaming the weights: one exchange for a layer's experts and one for the rest of it, and no more held than that."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import architectures, build, groups, hf_weights, parallel
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from tests import gloo, tiny

LAYERS, EXPERTS = 2, 16
NORMS = 2  # of a dense layer: replicated on every rank
LAYOUTS: list[tuple[str, dict[str, Any], int, int]] = [  # model, layout, gathers of rank 0, broadcasts
    ("qwen2", {"tensor": 2}, LAYERS + 3, 0),
    (
        "qwen3_moe",
        {"tensor": 2, "sequence": True},
        LAYERS + 3,
        0,
    ),  # and embedding, last norm, output layer; experts are not sharded
    ("qwen3_moe", {"expert": 2}, LAYERS, 0),
    ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2}, 2 * LAYERS + 3, 0),
    (
        "qwen3_moe",
        {"pipeline": 2, "expert": 2},
        LAYERS // 2,
        2 * LAYERS + 3,
    ),  # half of the layers are gathered on another stage
]


def counted(rank: int, world: int, path: str, layout: dict[str, Any]) -> tuple[Counter, int, int]:
    """Collectives of one stream, the largest exchange, and the largest part of a layer that travels together."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    architecture = architectures.read_architecture(read_hf_config(path))
    experts = architecture.experts and replace(architecture.experts, num=EXPERTS)
    architecture = replace(architecture, num_layers=LAYERS, experts=experts)
    policy = build.build_reference(architecture, ModelLayout(**layout), ModelOptions(torch.float32))
    calls: Counter = Counter()
    sizes = []

    def watch(name: str, real: Any) -> Any:
        def spy(target: Any, *args: Any, group: Any, **options: Any) -> Any:
            if group.size() > 1:
                calls[name.removesuffix("_into_tensor")] += 1
                sizes.append(sum(x.numel() for x in target) if isinstance(target, list) else target.numel())
            return real(target, *args, group=group, **options)

        return spy

    distributed: Any = dist
    for name in ("all_gather", "all_gather_into_tensor", "broadcast"):
        setattr(distributed, name, watch(name, getattr(dist, name)))
    found = dict(hf_weights.PolicyWeights(policy))
    layer = [tensor.numel() for name, tensor in found.items() if ".layers.0." in name]
    of_experts = [tensor.numel() for name, tensor in found.items() if ".layers.0.mlp.experts." in name]
    assert len(of_experts) == (3 * EXPERTS if experts else 0) and groups.expert().size() == layout.get("expert", 1)
    return calls, max(sizes), sum(of_experts or layer) + (0 if experts else NORMS * world * architecture.hidden_size)


@pytest.mark.parametrize(("kind", "layout", "gathers", "broadcasts"), LAYOUTS, ids=str)
def test_a_layer_is_two_exchanges(kind: str, layout: dict[str, Any], gathers: int, broadcasts: int) -> None:
    _, path = tiny.hf_model(kind)
    world = 4 if len(layout) == 3 or "pipeline" in layout else 2
    calls, max_over_ranks, layer = gloo.run(counted, world, str(path), layout)[0]
    assert calls == Counter({"all_gather": gathers, **({"broadcast": broadcasts} if broadcasts else {})})
    assert max_over_ranks <= layer


def test_what_is_streamed_outlives_the_stream() -> None:
    """Each tensor is its own: a consumer may keep one without keeping its layer."""
    _, path = tiny.hf_model("qwen3_moe")
    assert all(gloo.run(owned, 1, str(path)))


def owned(rank: int, world: int, path: str) -> bool:
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=1))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_reference(architecture, ModelLayout(), ModelOptions(torch.float32))
    found = list(hf_weights.PolicyWeights(policy))
    parameters = {p.untyped_storage().data_ptr() for module in policy.modules for p in module.parameters()}
    storages = [tensor.untyped_storage() for _, tensor in found]
    own_storage = all(s.nbytes() == t.numel() * t.element_size() for s, (_, t) in zip(storages, found, strict=True))
    return own_storage and not parameters & {storage.data_ptr() for storage in storages}

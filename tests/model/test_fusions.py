"""Fusions: off without Transformer Engine; what a CPU can compute fused gives the same numbers as unfused.

Megatron's fused SwiGLU has its own backward, so its formulas are compared; what its compiler makes of them on a GPU,
and Transformer Engine's kernels, are compared there (tests/gpu).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import FusionsConfig, ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import architectures, hf_weights, parallel
from megatron_ext.model.build import build_policy
from megatron_ext.model.forward import forward_backward
from megatron_ext.model.megatron_config import Fusions, ModelLayout, ModelOptions, transformer_config
from megatron_ext.train import packing
from tests import gloo, tiny

SWIGLU = Fusions(rope=False, bias_activation=True, gradient_accumulation=False, moe_permute=False)


def gradients(rank: int, world: int, path: str, fused: bool, layout: dict[str, Any]) -> dict[str, Tensor]:
    """Of the sum of log-probs over two micro-batches."""
    cpu_compat.enter()
    if fused:
        vars_of: Any = Fusions
        vars_of.here = lambda self: self  # as where Transformer Engine is
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build_policy(architecture, ModelLayout(**layout), ModelOptions(torch.float32, fusions=SWIGLU))
    assert policy.modules[0].config.bias_activation_fusion is fused
    for module in policy.modules:
        hf_weights.load_weights(module, architecture, path)
    micro_batches = [packing.pack([((1, 2, 3), (4, 5, 6))], multiple=2), packing.pack([((7, 8), (9, 10))], multiple=2)]
    with torch.compiler.set_stance("force_eager"):
        forward_backward(policy, micro_batches, Needs(), 1.0, lambda _, stats: stats.logprob.sum())
    mains = [{name: vars(p)["main_grad"] for name, p in m.named_parameters()} for m in policy.modules]
    return dict(hf_weights.stream(policy, mains))


@pytest.mark.parametrize(
    ("kind", "world", "layout"),
    [("qwen2", 1, {}), ("qwen3_moe", 1, {}), ("qwen3_moe", 2, {"tensor": 2, "sequence": True})],
)
def test_fused_swiglu_has_the_gradients_of_the_unfused(kind: str, world: int, layout: dict[str, Any]) -> None:
    path = str(tiny.hf_model(kind)[1])
    plain, fused = (gloo.run(gradients, world, path, on, layout) for on in (False, True))
    for one, other in zip(plain, fused, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert float((value - other[name]).norm()) <= 1e-5 * float(value.norm()), name


def switches(rank: int, world: int) -> list[bool]:
    cpu_compat.enter()
    architecture = architectures.read_architecture(read_hf_config(tiny.hf_model("qwen3_moe")[1]))
    config = transformer_config(architecture, ModelLayout(), ModelOptions(torch.bfloat16))
    return [
        *(config.apply_rope_fusion, config.bias_activation_fusion),
        *(config.gradient_accumulation_fusion, config.moe_permute_fusion),
    ]


def test_on_a_cpu_all_are_off() -> None:
    assert gloo.run(switches, 1) == [[False] * 4]


def test_a_recipe_names_those_that_there_are() -> None:
    assert Fusions(**FusionsConfig().model_dump()) == Fusions(True, True, True, True)

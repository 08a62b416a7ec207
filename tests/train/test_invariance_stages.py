"""One optimizer step of SIREN under expert parallelism, and with uneven and interleaved pipeline stages.

The same loss and gradients as the formula's in fp64, whatever the layout (tests/train/test_invariance.py).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import gloo, tiny
from tests.train.test_invariance import SIREN, norm, one_step, reference, worst

EXPERTS = [  # tensor, pipeline, data, sequence, budget of a micro-batch; the rest of the layout
    ((1, 1, 1, False, 1000), {}),
    ((1, 1, 2, False, 40), {"expert": 2}),
    ((2, 1, 1, True, 60), {}),
    ((2, 1, 2, True, 45), {"expert": 2}),
    ((2, 1, 2, True, 45), {"expert": 2, "expert_tensor": 2}),
    ((1, 2, 2, False, 40), {"expert": 2}),
]
STAGES = [
    ((2, 1, 1, False, 60), {}),  # query and key norms, whole on ranks that hold different heads
    ((1, 2, 1, False, 50), {"virtual": 2}),
    ((1, 3, 1, False, 50), {"stage_layers": (2, 1, 1)}),
    ((2, 2, 1, True, 45), {"virtual": 2}),
]


def step(rank: int, world: int, path: str, layout: tuple, more: dict[str, Any]) -> Any:
    return one_step(rank, world, path, layout, SIREN, **more)


@functools.cache
def formula(kind: str, tied: bool) -> tuple[float, dict[str, Tensor]]:
    loss, gradients = reference("inclusive", kind, tied)
    return loss, {name: each for whole, value in gradients.items() for name, each in by_expert(whole, value).items()}


def by_expert(name: str, value: Tensor) -> dict[str, Tensor]:
    """transformers holds all experts of a layer in one parameter, and gate above up; its files do not."""
    at = name.rpartition(".")[0]
    if name.endswith("experts.gate_up_proj"):
        halves = [each.chunk(2) for each in value]
        return {
            f"{at}.{e}.{p}.weight": halves[e][i]
            for e in range(len(halves))
            for i, p in enumerate(("gate_proj", "up_proj"))
        }
    if name.endswith("experts.down_proj"):
        return {f"{at}.{e}.down_proj.weight": each for e, each in enumerate(value)}
    return {name: value}


def check(kind: str, tied: bool, layout: tuple, more: dict[str, Any]) -> None:
    loss, gradients = formula(kind, tied)
    tensor, pipeline, data, _, _ = layout
    _, path = tiny.hf_model(kind, tied)
    for metrics, found in gloo.run(step, tensor * pipeline * data, str(path), layout, more):
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad/norm"] == pytest.approx(norm(gradients), rel=1e-5)
        assert worst(found, gradients) < 1e-5


@pytest.mark.parametrize(("layout", "more"), EXPERTS, ids=str)
def test_experts_have_the_gradient_of_the_formula(layout: tuple, more: dict[str, Any]) -> None:
    check("qwen3_moe", False, layout, more)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layout", "more"), STAGES, ids=str)
def test_stages_have_the_gradient_of_the_formula(layout: tuple, more: dict[str, Any], tied: bool) -> None:
    check("qwen3", tied, layout, more)


def test_every_expert_has_a_gradient() -> None:
    assert all(torch.any(value) for name, value in formula("qwen3_moe", False)[1].items() if ".experts." in name)

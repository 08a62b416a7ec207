"""One optimizer step of SIREN under context parallelism: the loss and gradients of the formula in fp64.

Quantiles and means of whole sequences are in it, and every token's gradient, through the keys and values of other
ranks too (tests/train/test_invariance.py).
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from megatron_ext.model import context
from tests import gloo, tiny
from tests.train.test_invariance import SIREN, norm, one_step, reference, worst
from tests.train.test_invariance_stages import formula

LAYOUTS = [  # tensor, pipeline, data, sequence, budget of a micro-batch; the rest of the layout
    ((1, 1, 1, False, 1000), {"context": 2}),
    ((1, 1, 1, False, 30), {"context": 2}),
    ((2, 1, 1, True, 60), {"context": 2}),
    ((1, 2, 1, False, 50), {"context": 2}),
    ((1, 1, 2, False, 40), {"context": 2}),
    ((1, 1, 1, False, 70), {"context": 4}),
]
VARIANTS: list[dict[str, Any]] = [{"fused_head": True}, {"recompute": "full"}]
EXPERTS = [
    ((1, 1, 1, False, 60), {"context": 2}),
    ((2, 1, 1, True, 60), {"context": 2, "expert": 4, "fused_head": True, "recompute": "mlp"}),  # as in recipes/long
]


def step(rank: int, world: int, path: str, layout: tuple, more: dict[str, Any]) -> Any:
    return one_step(rank, world, path, layout, SIREN, share_prompts=False, **more)


def check(kind: str, layout: tuple, more: dict[str, Any], expected: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradients = expected
    tensor, pipeline, data, _, _ = layout
    _, path = tiny.hf_model(kind)
    for metrics, found in gloo.run(step, tensor * pipeline * data * more["context"], str(path), layout, more):
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad/norm"] == pytest.approx(norm(gradients), rel=1e-5)
        assert worst(found, gradients) < 1e-5


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, Tensor]]:
    return reference("inclusive")


@pytest.mark.parametrize(("layout", "more"), LAYOUTS, ids=str)
def test_a_cut_sequence_has_the_gradient_of_the_formula(layout: tuple, more: dict[str, Any], expected: tuple) -> None:
    check("qwen2", layout, more, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_cut_sequence_has_it_however_memory_is_saved(variant: dict[str, Any], expected: tuple) -> None:
    layout, more = LAYOUTS[1]
    check("qwen2", layout, more | variant, expected)


@pytest.mark.parametrize(("layout", "more"), EXPERTS, ids=str)
def test_experts_have_the_gradient_of_the_formula_for_cut_sequences(layout: tuple, more: dict[str, Any]) -> None:
    check("qwen3_moe", layout, more, formula("qwen3_moe", False))


def blind(rank: int, world: int, path: str, layout: tuple, more: dict[str, Any]) -> Any:
    """A step in which a rank's keys and values have no gradient from the other ranks' queries."""
    real = context.all_ranks

    def all_ranks(own: Tensor) -> Tensor:
        found = real(own.detach()).clone()
        found[rank * len(own) :][: len(own)] = own
        return found

    context.all_ranks = all_ranks
    return step(rank, world, path, layout, more)


def test_a_gradient_that_stays_on_its_rank_is_seen(expected: tuple) -> None:
    layout, more = LAYOUTS[1]
    for _, found in gloo.run(blind, 2, str(tiny.hf_model()[1]), layout, more):
        assert worst(found, expected[1]) > 1e-2

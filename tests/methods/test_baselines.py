"""What makes methods comparable: all take the same common options, and one that is switched off is its baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.methods import METHODS
from tests.methods.cases import Case, run

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
COMMON = {"normalise": False, "clip_low": 0.1, "clip_high": 0.3, "beta": 0.01, "dual_clip": 3.0}

WIDE = {"aggregation": "token-mean", "clip_low": 0.6, "clip_high": 1.5, "dual_clip": 50.0}

# method and options that switch its own part off, its baseline, and what that differs in by default
OFF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "entropic": ({"k_p": 0.0, "k_i": 0.0}, {"name": "grpo", "aggregation": "token-mean"}),
    "aer": ({"alpha_0": 0.0, "adapt": False}, {"name": "grpo"}),
    "siren": ({"coef": 0.0}, {"name": "dr_grpo"}),
    "entropy_advantage": ({"alpha": 0.0}, {"name": "clip_higher"}),
    "entropy_advantage_ppo": ({"alpha": 0.0}, {"name": "ppo"}),
    "sent": ({"beta_low": 0.0, "beta_high": 0.0}, {"name": "grpo"}),
    "erc": ({"ratio_low": 0.0, "ratio_high": 1e12}, {"name": "clip_higher"}),
    "lp_reg": (
        {"kl_coef": 0.0},
        {"name": "grpo", "aggregation": "token-mean", "clip_low": 1.0, "clip_high": 9.0, "dual_clip": 10.0},
    ),
    "steer": ({"lambda_min": 1.0}, {"name": "clip_higher"}),
    "entropy_bonus": ({"coef": 0.0}, {"name": "grpo"}),
    "high_entropy_reward": ({"coef": 0.0}, {"name": "grpo"}),
    "dr_grpo": ({"aggregation": "seq-mean-token-mean", "normalise": True, "clip_high": 0.2}, {"name": "grpo"}),
    "clip_higher": ({"aggregation": "seq-mean-token-mean", "clip_high": 0.2}, {"name": "grpo"}),
    "aec": ({"target": 1e-9, "c_0": 0.0}, {"name": "grpo", "aggregation": "token-mean"}),
    "adapo": ({"delta": 0.0}, {"name": "clip_higher"}),
    "entrocraft": ({"h_high": 99.0, "h_low": 0.0, "anneal_steps": 999}, {"name": "grpo", "aggregation": "token-mean"}),
    "mai_clip": ({"k_max": 0.0}, {"name": "grpo", **WIDE}),
    "repo": ({"zeta_0": 0.0, "adapt": False}, {"name": "grpo"}),
}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_options_that_all_share(name: str, aggregation: str, case: Case) -> None:
    """So a paper can state them once. The aggregation is at work in each; the scale of the gradient shows it."""
    method = methods.create({"name": name, "aggregation": aggregation, **COMMON})
    assert {option: getattr(method, option) for option in COMMON} == COMMON
    other = AGGREGATIONS[AGGREGATIONS.index(aggregation) - 1]
    gradients = [run(case, {"name": name, "aggregation": each, **COMMON}).gradient for each in (aggregation, other)]
    assert gradients[0].norm() > 0 and not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


@pytest.mark.parametrize("shared", [{}, {"aggregation": "token-mean", "normalise": False, "clip_high": 0.28}])
@pytest.mark.parametrize("name", OFF)
def test_a_method_that_is_switched_off_is_its_baseline_to_the_bit(
    name: str, shared: dict[str, Any], case: Case
) -> None:
    options, baseline = OFF[name]
    common = shared if not options.keys() & shared.keys() else {}
    off, plain = run(case, {"name": name, **options, **common}), run(case, baseline | common)
    assert torch.equal(off.gradient, plain.gradient) and off.loss == plain.loss
    assert torch.equal(off.value_gradient, plain.value_gradient)
    assert plain.gradient.norm() > 0

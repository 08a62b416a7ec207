"""``scope = "micro_batch"``, the authors' way: what each micro-batch chooses, it chooses as if it were alone.

A mini-batch alone is tested against the equations in each method's own file.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.methods.selection import Selective
from tests.methods.cases import OPTIONS, Case, run

GROUPS = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0, float("nan"), 1.0, 0.0]]  # a micro-batch each
BY_RESPONSES = ("forking_tokens", "forking_tokens, response")  # a mean of the micro-batches' own means
BY_ITSELF = ("dmmpt",)  # a response is switched by its own entropy: the scope is nothing to it
ALL = {"r": 1.0}  # Clip-Cov draws by a token's place in the batch: here every eligible one
TUNED: dict[str, dict[str, Any]] = {"clip_cov": ALL, "lp_reg": {"rho": 0.3}, "dmmpt, batch": {"sigma": 1.2}}


def part(case: Case, first: int) -> Case:
    """Four responses from ``first`` on, a group, as a case of their own."""
    rows = range(first, first + 4)
    at = [t for i in rows for t in case.tokens_of(i)]
    own = copy(case)
    own.reward, own.group, own.lengths = (x[first : first + 4] for x in (case.reward, case.group, case.lengths))
    own.sequence = case.sequence[at] - first
    own.token, own.old, own.ref, own.old_value = (x[at] for x in (case.token, case.old, case.ref, case.old_value))
    own.logits, own.value = (x.detach()[at].requires_grad_() for x in (case.logits, case.value))
    return own


def names() -> list[str]:
    """Those that choose tokens of a mini-batch; SIREN's square is in its own file."""
    kinds = {name: type(methods.create(options)) for name, options in OPTIONS.items()}
    return [name for name, kind in kinds.items() if issubclass(kind, Selective) and not name.startswith("siren")]


@pytest.mark.parametrize("name", names())
def test_each_micro_batch_chooses_as_if_it_were_alone(name: str) -> None:
    case = Case(rewards=GROUPS)
    options = OPTIONS[name] | TUNED.get(name, {})
    whole = run(case, options | {"scope": "micro_batch"}, micro_batch=4)
    one = run(case, options | {"scope": "mini_batch"})
    assert torch.allclose(whole.gradient, one.gradient, rtol=1e-4, atol=1e-9) == (name in BY_ITSELF)
    by_token = methods.create(options).aggregation == "token-mean" and name not in BY_RESPONSES
    expected = torch.zeros_like(whole.gradient)
    for first in range(0, len(case.reward), 4):
        own = part(case, first)
        share = len(own.tokens) / len(case.tokens) if by_token else len(own.valid) / len(case.valid)
        at = [t for i in range(first, first + 4) for t in case.tokens_of(i)]
        expected[at] = share * run(own, options | {"scope": "mini_batch"}).gradient
    assert torch.allclose(whole.gradient, expected, rtol=1e-6, atol=1e-9)

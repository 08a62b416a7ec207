"""The bonus on high-entropy tokens against the equation."""

from __future__ import annotations

import torch

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run


def test_the_bonus_is_the_mean_over_the_selected_tokens() -> None:
    case = Case()
    h = entropy(case.logits)
    selected = sorted(case.tokens, key=lambda t: -float(h[t]))[: int(0.3 * len(case.tokens))]
    policy = clipped(case.ratio, case.advantages(), 0.2, 0.2)
    loss = torch.stack([policy[list(case.rows(i))].mean() for i in case.valid]).mean()
    assert close(run(case, OPTIONS["high_entropy_reward"]), loss - 0.2 * h[selected].mean(), case)

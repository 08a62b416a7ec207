"""The bonus on high-entropy tokens against the equation."""

from __future__ import annotations

import torch

from tests.methods.cases import OPTIONS, Case, clipped, close, entropy, run


def test_the_bonus_is_the_mean_over_the_selected_tokens() -> None:
    case = Case()
    h = entropy(case.logits)
    selected = sorted(case.tokens, key=lambda t: -float(h[t]))[: int(0.3 * len(case.tokens))]
    policy = clipped(case.ratio, case.advantages(), 0.2, 0.2)
    loss = torch.stack([policy[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    assert close(run(case, OPTIONS["high_entropy_reward"]), loss - 0.2 * h[selected].mean(), case)


def test_the_scope_of_a_micro_batch_is_a_mean_of_micro_batch_means() -> None:
    case = Case()
    h, policy = entropy(case.logits), clipped(case.ratio, case.advantages(), 0.2, 0.2)
    loss = torch.stack([policy[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    for start in range(0, len(case.reward), 4):
        rows = [i for i in range(start, min(start + 4, len(case.reward))) if i in case.valid]
        own = sorted((t for i in rows for t in case.tokens_of(i)), key=lambda t: -float(h[t]))
        loss = loss - len(rows) / len(case.valid) * 0.2 * h[own[: int(0.3 * len(own))]].mean()
    assert close(run(case, OPTIONS["high_entropy_reward"] | {"scope": "micro_batch"}, micro_batch=4), loss, case)

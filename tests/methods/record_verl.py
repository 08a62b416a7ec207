"""Run verl's own Clip-Cov and KL-Cov on the tests' case and record what they give.

    .venv-bench/bin/python -m tests.methods.record_verl        (verl 0.9.1; nothing else imports this file)

Clip-Cov draws at random in verl too, so it is recorded where the draw takes every eligible token. Written are the
loss and its derivative with respect to each token's log-prob.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.methods.cases import MAX_LENGTH, OPTIONS, Case

RECORD = Path(__file__).with_name("verl.json")
RUNS = {"clip_cov": OPTIONS["clip_cov"] | {"r": 1.0}, "kl_cov": OPTIONS["kl_cov"]}


def record() -> dict[str, Any]:
    from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]

    case = Case()
    place = torch.cat([i * MAX_LENGTH + torch.arange(int(n)) for i, n in enumerate(case.lengths)])

    def padded(value: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(len(case.lengths) * MAX_LENGTH, dtype=torch.float64).index_put((place,), value)
        return whole.view(len(case.lengths), MAX_LENGTH)

    clip, kl = RUNS["clip_cov"], RUNS["kl_cov"]
    config = SimpleNamespace(
        clip_ratio=1.0,
        clip_ratio_low=1.0,
        clip_ratio_high=1.0,
        global_batch_info={},
        policy_loss=SimpleNamespace(
            clip_cov_ratio=clip["r"],
            clip_cov_lb=clip["w_low"],
            clip_cov_ub=clip["w_high"],
            kl_cov_ratio=kl["k"],
            ppo_kl_coef=kl["kl_coef"],
        ),
    )
    mask = torch.zeros(len(case.token), dtype=torch.float64)
    mask[case.tokens] = 1.0
    result: dict[str, Any] = {}
    for name in RUNS:
        logp = case.logp(case.logits).detach().requires_grad_()
        loss, _ = getattr(core_algos, f"compute_policy_loss_{name}")(
            old_log_prob=padded(case.logp(case.old)),
            log_prob=padded(logp),
            advantages=padded(case.advantages()),
            response_mask=padded(mask),
            loss_agg_mode="token-mean",
            config=config,
        )
        [gradient] = torch.autograd.grad(loss, logp)
        result[name] = {"loss": float(loss.detach()), "gradient": gradient.tolist()}
    return result


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n")

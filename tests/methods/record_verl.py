"""Run verl's own policy losses on the tests' case and record what they give.

    .venv-bench/bin/python -m tests.methods.record_verl        (verl 0.9.1; nothing else imports this file)

Clip-Cov draws at random in verl too, so it is recorded where the draw takes every eligible token. Written are the
loss and its derivative with respect to each token's log-prob. The surrogates have been given advantages that differ
from token to token as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.methods.cases import OPTIONS, Case

RECORD = Path(__file__).with_name("verl.json")
BY_RESPONSE, BY_TOKEN = "seq-mean-token-mean", "token-mean"


def with_surrogate(name: str, aggregation: str) -> dict[str, Any]:
    return OPTIONS[f"grpo, {name}"] | {"aggregation": aggregation}


RUNS: dict[str, dict[str, Any]] = {
    "clip_cov": OPTIONS["clip_cov"] | {"r": 1.0},
    "kl_cov": OPTIONS["kl_cov"],
    "vanilla": {"name": "clip_higher", "clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.3},
    "gspo": with_surrogate("gspo", BY_RESPONSE),
    "gspo, token-mean": with_surrogate("gspo", BY_TOKEN),
    "sapo": with_surrogate("sapo", BY_RESPONSE),  # verl's function has no other aggregation
    "cispo": with_surrogate("cispo", BY_TOKEN),
    "cispo, seq-mean": with_surrogate("cispo", BY_RESPONSE),
}
SURROGATES = [name for name in RUNS if "surrogate" in RUNS[name]]


def token_advantages(case: Case) -> Tensor:
    """``[T]``, other for every token and 0 where a response has no reward."""
    draw = torch.Generator().manual_seed(5)
    value = torch.randn(len(case.token), generator=draw, dtype=torch.float64)
    return torch.where(case.reward.isnan()[case.sequence], 0.0, value)


def config(options: dict[str, Any]) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig  # pyright: ignore[reportMissingImports]

    surrogate = {key: value for key, value in options.get("surrogate", {}).items() if key != "kind"}
    given = {"clip_low": 1.0, "clip_high": 1.0} | options | surrogate
    cov = {
        "clip_cov_ratio": given.get("r"),
        "clip_cov_lb": given.get("w_low"),
        "clip_cov_ub": given.get("w_high"),
        "kl_cov_ratio": given.get("k"),
        "ppo_kl_coef": given.get("kl_coef"),
    }
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=given["clip_low"],
        clip_ratio_high=given["clip_high"],
        clip_ratio_c=given.get("dual_clip", 3.0),
        tau_pos=given.get("tau_pos", 1.0),
        tau_neg=given.get("tau_neg", 1.05),
        policy_loss=PolicyLossConfig(**{key: value for key, value in cov.items() if value is not None}),
    )


def record() -> dict[str, Any]:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn  # pyright: ignore[reportMissingImports]

    case = Case()
    mask = torch.zeros(len(case.token), dtype=torch.float64)
    mask[case.tokens] = 1.0

    def numbers(name: str, advantage: Tensor) -> dict[str, Any]:
        logp = case.logp(case.logits).detach().requires_grad_()
        loss, _ = get_policy_loss_fn(name.split(",")[0])(
            old_log_prob=case.padded(case.logp(case.old)),
            log_prob=case.padded(logp),
            advantages=case.padded(advantage),
            response_mask=case.padded(mask),
            loss_agg_mode=RUNS[name].get("aggregation", BY_TOKEN),
            config=config(RUNS[name]),
        )
        [gradient] = torch.autograd.grad(loss, logp)
        return {"loss": float(loss.detach()), "gradient": gradient.tolist()}

    found = {name: numbers(name, case.advantages()) for name in RUNS}
    return found | {f"{name}; advantages of tokens": numbers(name, token_advantages(case)) for name in SURROGATES}


if __name__ == "__main__":
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record().items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")

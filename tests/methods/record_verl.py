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


CLIPS = {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.3}
CRITIC = {"gamma": 0.9, "lam": 0.8}
VALUE_CLIP = 0.2
RUNS: dict[str, dict[str, Any]] = {
    "clip_cov": OPTIONS["clip_cov"] | {"r": 1.0},
    "kl_cov": OPTIONS["kl_cov"],
    "vanilla": {"name": "clip_higher", **CLIPS},
    "vanilla, seq-mean": {"name": "grpo", "aggregation": BY_RESPONSE, **CLIPS},
    "vanilla, dr_grpo": {"name": "dr_grpo", "aggregation": "seq-mean-token-sum-norm", **CLIPS},
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


def estimates(case: Case) -> dict[str, Any]:
    """Of the responses with a reward: group-relative advantages with and without the deviation, GAE whitened and its
    returns, the value loss with its derivative, and the k3 estimate of the KL to the reference. ``[T]`` each."""
    from verl.trainer.ppo import core_algos  # pyright: ignore[reportMissingImports]

    rows = torch.tensor(case.valid)
    mask = case.padded(torch.ones(len(case.token), dtype=torch.float64))[rows]
    reward = torch.zeros_like(mask)
    reward[torch.arange(len(rows)), case.lengths[rows] - 1] = case.reward[rows].double()
    groups = case.group[rows].numpy()

    def flat(padded: Tensor) -> list[float]:
        return padded[mask.bool()].tolist()

    relative = {
        f"relative, {by_deviation}": flat(
            core_algos.compute_grpo_outcome_advantage(reward, mask, groups, norm_adv_by_std_in_grpo=by_deviation)[0]
        )
        for by_deviation in (True, False)
    }
    before = case.padded(case.old_value)[rows]
    whitened, returns = core_algos.compute_gae_advantage_return(reward, before, mask, **CRITIC)
    value = case.value.detach().requires_grad_()
    loss, _ = core_algos.compute_value_loss(case.padded(value)[rows], returns, before, mask, VALUE_CLIP)
    [gradient] = torch.autograd.grad(loss, value)
    k3 = core_algos.kl_penalty_forward(case.logp(case.logits), case.logp(case.ref), "low_var_kl").detach()
    return {
        **relative,
        "whitened": flat(whitened),
        "value loss": float(loss.detach()),
        "value gradient": gradient.tolist(),
        "k3": k3[case.tokens].tolist(),
    }


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

    found = {name: numbers(name, case.advantages(normalise=name != "vanilla, dr_grpo")) for name in RUNS}
    found["estimates"] = estimates(case)
    return found | {f"{name}; advantages of tokens": numbers(name, token_advantages(case)) for name in SURROGATES}


if __name__ == "__main__":
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record().items())
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")

"""What happens where the rollout engine's distribution is not the trainer's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import OneRank
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.train import mismatch
from megatron_ext.types import Sample
from tests.methods import cases
from tests.train import whole_run

KNOWN = {"response/length": 50.0, "response/unknown_logprobs": 0.0}
OFF = {"unknown_logprobs": 1.0}


def test_the_importance_is_the_ratio_with_its_tail_cut_off() -> None:
    old, rollout = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.5, -0.5, -9.0])
    found = mismatch.importance(old, rollout, 2.0)
    assert found is not None and found.tolist() == pytest.approx([math.exp(0.5), math.exp(-0.5), 2.0])
    assert mismatch.importance(old, rollout, 0.0) is None


def test_what_the_engine_does_not_know_is_the_trainers() -> None:
    reported = torch.tensor([math.nan, -math.inf, -0.25])
    assert mismatch.known(reported, torch.tensor([-1.0, -2.0, -3.0])).tolist() == [-1.0, -2.0, -0.25]


def gradient(name: str, **changed: torch.Tensor) -> torch.Tensor:
    """Of a whole step of one mini-batch, ``[T, V]``; ``changed`` are fields of its batch."""
    case = cases.Case()
    method = methods.create({"name": name, **({"beta": 0.1} if name == "grpo" else {})})
    whole = cases.replace(cases.batch(case, method), **changed)
    stats = cases.statistics(case, case.logits, method.needs)
    method.on_step_start(whole, cases.statistics(case, case.old, cases.replace(method.needs, entropy=True)), OneRank())
    prepared = method.prepare(whole, stats.detach() if method.needs.current else None, OneRank())
    return case.gradient(method.loss(whole, stats, prepared).sum())


def importance(weight: float) -> torch.Tensor:
    return torch.full_like(cases.Case().sequence, weight, dtype=torch.float32)


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"ppo", "entropy_advantage_ppo"}))
def test_importance_scales_the_policy_loss(name: str) -> None:
    """Linearly: known at weights 1 and 3, it is known at 2."""
    one, two, three = (gradient(name, importance=importance(weight)) for weight in (1.0, 2.0, 3.0))
    assert torch.equal(gradient(name), one) and not torch.allclose(one, three)
    assert (two - (one + three) / 2).norm() <= 1e-6 * two.norm()


@pytest.mark.parametrize("name", ["grpo", "entropy_bonus", "siren", "kl_cov"])
def test_importance_leaves_regularisers_as_they_are(name: str) -> None:
    """With no weight on the policy loss what is left is what is learnt without an advantage."""
    nothing = gradient(name, importance=importance(0.0))
    assert nothing.norm() > 0
    if name != "kl_cov":  # whose penalty is on tokens that are chosen by advantage
        assert torch.equal(nothing, gradient(name, advantage=importance(0.0)))


def test_a_run_stops_when_the_engine_samples_from_another_policy(tmp_path: Path) -> None:
    """HF's float32 differs from Megatron's in the last digits: enough for a limit of 1e-12, not for the default."""
    recipe = "siren/siren-tiny-cpu.toml"
    with pytest.raises(AssertionError, match=r"MismatchError: rollout: the engine's log-probs differ .* expected at"):
        whole_run.train(tmp_path / "strict", recipe, "alarms.mismatch=1e-12")
    assert whole_run.train(tmp_path / "default", recipe, "rollout.top_p=0.7", "rollout.sampling_replay=off") == 0
    steps = whole_run.metrics(tmp_path / "default")
    assert all(0 < step["mismatch/mean"] < -math.log(0.7) and step["response/unknown_logprobs"] == 0 for step in steps)


def test_a_run_stops_when_the_engine_does_not_tell_its_log_probs() -> None:
    """The trainer's stand in for them, so the mismatch is 0."""
    config = Config.model_validate({})
    told = {"mismatch/mean": 0.0, "response/length": 50.0}
    mismatch.check(told | {"response/unknown_logprobs": 0.4}, config)
    with pytest.raises(mismatch.MismatchError, match=r"does not tell the log-probs of 0\.012 of its tokens.*0\.01"):
        mismatch.check(told | {"response/unknown_logprobs": 0.6}, config)
    mismatch.check(told | {"response/unknown_logprobs": 50.0}, Config.model_validate({"alarms": OFF}))


def test_a_run_of_unknown_log_probs_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = HFEngine.generate

    def unknown(self: HFEngine, *args: Any) -> list[Sample]:
        return [replace(each, logprobs=(math.nan,) * len(each.logprobs)) for each in generate(self, *args)]

    monkeypatch.setattr(HFEngine, "generate", unknown)
    with pytest.raises(AssertionError, match="MismatchError: rollout: the engine does not tell the log-probs of 1 of"):
        whole_run.train(tmp_path, "siren/siren-tiny-cpu.toml")


def test_a_nucleus_may_raise_the_engines_log_probs() -> None:
    nucleus = {"top_p": 0.5, "sampling_replay": "off"}
    config = Config.model_validate({"rollout": nucleus, "alarms": {"mismatch": 0.1}})
    mismatch.check(KNOWN | {"mismatch/mean": 0.79}, config)  # log 2 + .1
    with pytest.raises(mismatch.MismatchError, match=r"0\.8 nats"):
        mismatch.check(KNOWN | {"mismatch/mean": 0.8}, config)
    top_k = Config.model_validate({"rollout": nucleus | {"top_k": 5}, "alarms": {"mismatch": 0.1}})
    mismatch.check(KNOWN | {"mismatch/mean": 9.9}, top_k)
    mismatch.check(KNOWN | {"mismatch/mean": 9.9}, Config.model_validate({"alarms": {"mismatch": 0}}))


def test_sampling_replay_leaves_nothing_to_allow_for() -> None:
    restricted = {"top_p": 0.5, "top_k": 5, "min_p": 0.1}
    config = Config.model_validate({"rollout": restricted, "alarms": {"mismatch": 0.1}})
    mismatch.check(KNOWN | {"mismatch/mean": 0.09}, config)
    with pytest.raises(mismatch.MismatchError, match=r"0\.11 nats .* at most 0\.1 "):
        mismatch.check(KNOWN | {"mismatch/mean": 0.11}, config)


def test_importance_changes_a_run_only_where_the_engine_differs(tmp_path: Path) -> None:
    recipe, nucleus = "grpo/grpo-tiny-cpu.toml", ["rollout.top_p=0.6", "rollout.sampling_replay=off"]
    for name, options in (("off", nucleus), ("on", [*nucleus, "train.importance_cap=2.0"])):
        assert whole_run.train(tmp_path / name, recipe, *options, "train.steps=1") == 0
    off, on = (whole_run.metrics(tmp_path / name)[0] for name in ("off", "on"))
    assert off["mismatch/mean"] == on["mismatch/mean"] and off["grad/norm"] != on["grad/norm"]


def test_offloading_the_optimizer_changes_no_bit(tmp_path: Path) -> None:
    recipe = "siren/siren-tiny-cpu.toml"
    for name, options in (("here", []), ("away", ["model.offload_optimizer=true"])):
        assert whole_run.train(tmp_path / name, recipe, *options) == 0
    assert whole_run.metrics(tmp_path / "away") == whole_run.metrics(tmp_path / "here")
    assert whole_run.contents(tmp_path / "away", 2) == {
        **whole_run.contents(tmp_path / "here", 2),
        **{name: hashed for name, hashed in whole_run.contents(tmp_path / "away", 2).items() if name == "config.json"},
    }
    saved = json.loads((tmp_path / "away" / "run" / "checkpoints" / "step_000002" / "MANIFEST.json").read_text())
    assert saved["config"]["model"]["offload_optimizer"]

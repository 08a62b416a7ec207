"""What happens where the rollout engine's distribution is not the trainer's."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext import methods
from megatron_ext.config.schema import Config, ImportanceConfig
from megatron_ext.methods.base import OneRank
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.train import mismatch
from megatron_ext.types import Sample
from tests.methods import cases
from tests.train import whole_run

KNOWN = {"response/length": 50.0, "response/unknown_logprobs": 0.0, "logprob/mean": -1.0}
OFF = {"unknown_logprobs": 1.0}


# Responses of 3, 1 and 2 tokens: probabilities pi_old / mu, whose geometric means are 1, 4 and (3 * 1/27)**.5 = 1/3.
RATIOS, SEQUENCE = [0.25, 8.0, 0.5, 4.0, 3.0, 1 / 27], torch.tensor([0, 0, 0, 1, 2, 2])


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [0.25, 3.5, 0.5, 3.5, 3.0, 1 / 27]),
        ("token", "mask", [0.0, 0.0, 0.5, 0.0, 3.0, 0.0]),  # 1 / 3.5 is above .25
        ("sequence", "truncate", [1.0, 1.0, 1.0, 3.5, 1 / 3, 1 / 3]),
        ("sequence", "mask", [1.0, 1.0, 1.0, 0.0, 1 / 3, 1 / 3]),
    ],
)
def test_the_importance_of_each_mode_by_hand(level: str, mode: str, expected: list[float]) -> None:
    mu = torch.tensor([0.9, 0.05, 0.6, 0.2, 0.3, 0.81])
    config = ImportanceConfig.model_validate({"level": level, "mode": mode, "cap": 3.5})
    found = mismatch.importance((mu * torch.tensor(RATIOS)).log(), mu.log(), SEQUENCE, config)
    assert found is not None and found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, rel=1e-5)
    empty = mismatch.importance(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), config)
    assert empty is not None and len(empty) == 0


def test_no_importance_is_the_default() -> None:
    assert mismatch.importance(torch.zeros(1), torch.ones(1), torch.zeros(1), Config().importance) is None


@pytest.mark.parametrize(
    ("mode", "weights", "expected"),
    [
        ("truncate", [0.5, 2.0, 2.0, 1.5], {"importance/weight": 4 / 3, "importance/truncated": 1 / 3}),
        ("mask", [0.5, 0.0, 0.0, 0.0], {"importance/weight": 0.5 / 3, "importance/masked": 2 / 3}),
    ],
)
def test_what_is_corrected_is_counted_over_the_valid_tokens(mode: str, weights: list, expected: dict) -> None:
    """The second token is of a response without reward."""
    whole = cases.batch(cases.Case(), methods.create({"name": "grpo"}))
    batch = cases.replace(whole, importance=torch.tensor(weights), mask=torch.tensor([True, False, True, True]))
    config = ImportanceConfig.model_validate({"mode": mode})
    assert mismatch.corrections(batch, config, OneRank()) == pytest.approx(expected)
    assert mismatch.corrections(whole, ImportanceConfig(), OneRank()) == {}


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


REGULARISED = ("grpo", "entropy_bonus", "high_entropy_reward", "kl_cov", "siren", "aec", "aer", "sent", "lp_reg")
LEVELS_AND_MODES = [(level, mode) for level in ("token", "sequence") for mode in ("truncate", "mask")]


@pytest.mark.parametrize(("level", "mode"), LEVELS_AND_MODES)
@pytest.mark.parametrize("name", sorted(cases.OPTIONS))
def test_the_weight_reaches_every_methods_loss_in_the_same_way(name: str, level: str, mode: str) -> None:
    """The loss is that of an identical batch whose policy loss is scaled by hand, token by token.

    Without ``Batch.corrected``: the gradient is linear in each token's policy loss, so what a weight of 1 adds over a
    weight of 0 (nothing but regularisers), times the weight, is what each weight adds.
    """
    case = cases.Case()
    method = methods.create(cases.OPTIONS[name])
    whole = cases.batch(case, method)
    draw = torch.Generator().manual_seed(5)
    mu = whole.old_logprob + 0.6 * torch.randn(len(whole.mask), generator=draw)
    config = ImportanceConfig.model_validate({"level": level, "mode": mode, "cap": 1.3})
    weight = mismatch.importance(whole.old_logprob, mu, whole.sequence, config)
    assert weight is not None and weight.unique().numel() > 2
    assert (weight == 0).any() if mode == "mask" else (weight == weight.max()).sum() > 1

    def losses(factor: torch.Tensor | None) -> torch.Tensor:
        own, batch = copy.deepcopy(method), cases.replace(whole, importance=factor)
        own.on_step_start(batch, cases.statistics(case, case.old, observed).detach(), OneRank())
        prepared = own.prepare(batch, stats.detach() if own.needs.current else None, OneRank())
        return own.loss(batch, stats, prepared)

    observed = cases.replace(method.needs, entropy=True, nucleus_p=method.needs.nucleus_p or 0.8)
    stats = cases.statistics(case, case.logits, method.needs)
    off, rest = losses(None), losses(importance(0.0))
    assert (off - rest).detach().abs().max() > 1e-3
    assert name.partition(",")[0] in REGULARISED or not rest.any()  # nothing but a regulariser is left unweighed
    by_hand = rest + weight * (off - rest)
    found = losses(weight)
    assert torch.allclose(found, by_hand, rtol=1e-6, atol=1e-9)
    expected = case.gradient(by_hand.sum())
    assert (case.gradient(found.sum()) - expected).norm() <= 1e-6 * expected.norm()


def test_masked_tokens_stay_in_the_denominators() -> None:
    """With every token's policy loss -1, the loss is minus the kept share of all valid tokens."""
    case, method = cases.Case(), methods.create({"name": "grpo", "aggregation": "token-mean"})
    whole = cases.replace(cases.batch(case, method), advantage=torch.ones(len(case.sequence)))
    stats = cases.statistics(case, case.old, method.needs)
    kept = torch.arange(len(case.sequence)) % 2 == 0
    loss = method.loss(cases.replace(whole, importance=kept.float()), stats, method.prepare(whole, None, OneRank()))
    assert float(loss.sum()) == pytest.approx(-int((kept & whole.mask).sum()) / whole.num_tokens)


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
    told = {"mismatch/mean": 0.0, "response/length": 50.0, "logprob/mean": -1.0}
    mismatch.check(told | {"response/unknown_logprobs": 0.4}, config)
    with pytest.raises(mismatch.MismatchError, match=r"does not tell the log-probs of 0\.012 of its tokens.*0\.01"):
        mismatch.check(told | {"response/unknown_logprobs": 0.6}, config)
    mismatch.check(told | {"response/unknown_logprobs": 50.0}, Config.model_validate({"alarms": OFF}))


@pytest.mark.parametrize("lag", [0, 4])
def test_a_policy_that_is_broken_is_not_taken_for_the_engines_fault(lag: int) -> None:
    """Its log-probs stand in for what the engine does not tell, and what is compared with NaN is NaN."""
    found = KNOWN | {"logprob/mean": math.nan, "mismatch/mean": math.nan}
    for alarms in ({}, {"alarms": {"mismatch": 0}}):
        with pytest.raises(mismatch.MismatchError, match="the policy's own log-probs are not finite"):
            mismatch.check(found, Config.model_validate(alarms), lag=lag)


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
    for rule in ({"top_k": 5}, {"min_p": 0.1}):
        unbounded = Config.model_validate({"rollout": nucleus | rule, "alarms": {"mismatch": 0.1}})
        mismatch.check(KNOWN | {"mismatch/mean": 9.9}, unbounded)
    mismatch.check(KNOWN | {"mismatch/mean": 9.9}, Config.model_validate({"alarms": {"mismatch": 0}}))


def test_weights_of_steps_before_are_no_fault_of_the_engine() -> None:
    config = Config.model_validate({"alarms": {"mismatch": 0.1}})
    mismatch.check(KNOWN | {"mismatch/mean": 0.8}, config, lag=1)
    with pytest.raises(mismatch.MismatchError, match=r"0\.8 nats"):
        mismatch.check(KNOWN | {"mismatch/mean": 0.8}, config, lag=0)


def test_sampling_replay_leaves_nothing_to_allow_for() -> None:
    restricted = {"top_p": 0.5, "top_k": 5, "min_p": 0.1}
    config = Config.model_validate({"rollout": restricted, "alarms": {"mismatch": 0.1}})
    mismatch.check(KNOWN | {"mismatch/mean": 0.09}, config)
    with pytest.raises(mismatch.MismatchError, match=r"0\.11 nats .* at most 0\.1 "):
        mismatch.check(KNOWN | {"mismatch/mean": 0.11}, config)


def test_importance_changes_a_run_only_where_the_engine_differs(tmp_path: Path) -> None:
    recipe, nucleus = "grpo/grpo-tiny-cpu.toml", ["rollout.top_p=0.6", "rollout.sampling_replay=off"]
    mask = ["importance.mode=mask", "importance.level=sequence", "importance.cap=1.1"]
    for name, options in (("off", []), ("truncate", ["importance.mode=truncate"]), ("mask", mask)):
        assert whole_run.train(tmp_path / name, recipe, *nucleus, *options, "train.steps=1") == 0
    off, truncate, mask = (whole_run.metrics(tmp_path / name)[0] for name in ("off", "truncate", "mask"))
    assert off["mismatch/mean"] == truncate["mismatch/mean"] == mask["mismatch/mean"]
    assert len({off["grad/norm"], truncate["grad/norm"], mask["grad/norm"]}) == 3
    assert not any(key.startswith("importance/") for key in off)
    assert 0 < truncate["importance/weight"] < 1 and "importance/masked" not in truncate
    assert 0 < mask["importance/masked"] < 1 and "importance/truncated" not in mask


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

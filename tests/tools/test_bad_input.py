"""Bad input ends a command with exit code 2 and the reason, before ranks are started or a model is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.whole_run import RECIPES, ExactRewards
from tools import ranks, train


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(ranks, "run_ranks", refuse)
    monkeypatch.setattr("megatron_ext.rollout.rewards.reward_pool.RewardPool", ExactRewards)


def recipe(method: str) -> str:
    return str(RECIPES / method / f"{method}-tiny-cpu.toml")


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("entropic", "method.target=0", "method.target: found 0, expected an entropy above 0, in nats"),
        ("aec", "method.target=-0.1", "method.target: found -0.1, expected an entropy above 0, in nats"),
        ("siren", "method.tau=1.2", "method.tau: found 1.2, expected a quantile from 0 to below 1"),
        ("siren", "method.tau=-0.1", "method.tau: found -0.1"),
        ("aer", "method.tau=0", "method.tau: found 0, expected a ratio above 0"),
        ("aer", "method.tau=0", "method.tau: found 0"),
        ("dmmpt", "method.tau=0", "method.tau: found 0, expected a probability above 0 and at most 1"),
        ("siren", "method.p=0", "method.p: found 0, expected a mass above 0 and at most 1"),
        ("siren", "method.p=1.01", "method.p: found 1.01"),
        ("grpo", "rollout.top_p=0", "rollout.top_p: Input should be greater than 0, found 0"),
        ("grpo", "rollout.top_p=1.01", "rollout.top_p: Input should be less than or equal to 1, found 1.01"),
        (
            "entrocraft",
            'method.variant="authors"',
            "reward.wrong: found 0.0, but this entrocraft takes a wrong response",
        ),
        ("grpo", "rollout.samples=1", "rollout.samples: found 1, but grpo compares a response with the others"),
        ("siren", "rollout.samples=1", "rollout.samples: found 1, but siren compares"),
        ("clip_higher", "rollout.samples=1", "rollout.dynamic_sampling: keeps groups whose rewards differ"),
        ("sent", "data.curriculum=none.jsonl", "megatron-entropy semantic-entropy RECIPE --out none.jsonl"),
        ("grpo", "alarms.entropy_ceiling=1", "alarms.entropy_ceiling: Input should be greater than 1, found 1"),
        ("grpo", "alarms.entropy_flor=1", "alarms.entropy_flor: unknown key; did you mean entropy_floor?"),
    ],
)
def test_a_value_that_cannot_be(method: str, override: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert train.main([recipe(method), override]) == 2
    assert message in capsys.readouterr().err


def test_a_family_that_is_unknown_is_named_before_its_fields_are_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hf = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8}
    hf |= {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert train.main([recipe("grpo"), f'model.path="{tmp_path}"', "parallel.tensor=1", "--dry-run"]) == 2
    assert "MixtralForCausalLM of model_type mixtral is not supported" in capsys.readouterr().err


def test_a_method_that_compares_nothing_takes_single_responses(capsys: pytest.CaptureFixture) -> None:
    assert train.main([recipe("nsr"), "rollout.samples=1", "--print-config"]) == 0
    assert "\nsamples = 1\n" in capsys.readouterr().out


def test_a_curriculum_of_other_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = Path(RECIPES / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:20]))
    assert train.main([recipe("sent"), "--dry-run", f'data.train="{tmp_path}/train.jsonl"']) == 2
    message = capsys.readouterr().err
    assert "is of another data set: 3000 problems" in message and "2980 ids only in the curriculum" in message
    assert train.main([recipe("sent"), "--dry-run"]) == 0
    assert "1500 problems from step 1, then 1500 problems from step 31" in capsys.readouterr().out

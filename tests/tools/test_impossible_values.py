"""Values that no run can have end the command with exit code 2 and a line that names the key and what it may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import evaluate, train

TINY = str(Path(__file__).parents[2] / "recipes" / "tiny" / "tiny-cpu.toml")
FINITE = "Input should be a finite number"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.correct=nan", f"reward.correct: {FINITE}, found nan"),
        ("reward.wrong=-inf", f"reward.wrong: {FINITE}, found -inf"),
        ("reward.correct=1e300", "reward.correct: Input should be less than or equal to 1000000, found 1e+300"),
        ("reward.correct=0", "reward.correct: Input should be greater than 0, found 0"),
        (
            "reward.wrong=0.5",
            "reward.wrong: Input should be less than or equal to 0, found 0.5",
        ),
        ("reward.deadline_s=inf", f"reward.deadline_s: {FINITE}, found inf"),
        ("reward.deadline_s=0.00001", "reward.deadline_s: Input should be greater than or equal to 0.1, found 1e-05"),
        ("reward.workers=1000000000", "reward.workers: Input should be less than or equal to 1024, found 1000000000"),
        ("rollout.temperature=inf", f"rollout.temperature: {FINITE}, found inf"),
        ("rollout.temperature=nan", f"rollout.temperature: {FINITE}, found nan"),
        (
            "rollout.temperature=1e9",
            "rollout.temperature: Input should be less than or equal to 100, found 1000000000.0",
        ),
        ("rollout.servers.deadline_s=inf", f"rollout.servers.deadline_s: {FINITE}, found inf"),
        ("rollout.samples=4000000000", "rollout.samples: Input should be less than or equal to 2147483647"),
        ("optimizer.lr=inf", f"optimizer.lr: {FINITE}, found inf"),
        ("optimizer.lr=nan", f"optimizer.lr: {FINITE}, found nan"),
        ("optimizer.lr=1e30", "optimizer.lr: Input should be less than or equal to 1, found 1e+30"),
        ("optimizer.weight_decay=inf", f"optimizer.weight_decay: {FINITE}, found inf"),
        ("optimizer.clip_grad=nan", f"optimizer.clip_grad: {FINITE}, found nan"),
        ("critic.lr=inf", f"critic.lr: {FINITE}, found inf"),
        ("importance.cap=inf", f"importance.cap: {FINITE}, found inf"),
        ("importance.cap=0.5", "importance.cap: Input should be greater than or equal to 1, found 0.5"),
        ("train.importance_cap=2", 'here it is importance.cap (with importance.mode = "truncate")'),
        ("train.seed=100000000000000000000", "train.seed: Input should be less than or equal to 2147483647"),
        ("alarms.mismatch=inf", f"alarms.mismatch: {FINITE}, found inf"),
        ("method.coef=nan", "method: Value error, options are finite numbers, found {'coef': nan}"),
    ],
)
def test_training_refuses_it(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([TINY, override, "--print-config"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--temperature", "inf"), ("--temperature", "nan"), ("--top-p", "nan")])
def test_evaluation_refuses_it(option: str, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [str(Path(TINY).parent / "base"), "--data", str(tmp_path / "none.jsonl"), option, value]
    assert evaluate.main(command) == 2
    assert f"{option}: expected" in capsys.readouterr().err

"""A package outside the repository (docs/own-code.md): its method, reward and engine train the tiny recipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.config.aliases import keys
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.config.schema import Config, RewardConfig
from megatron_ext.plugins import KEYS
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.functions import find_reward
from megatron_ext.rollout.rewards.outcome import Outcome, counted
from megatron_ext.rollout.rewards.worker_pool import VerifierError
from megatron_ext.train.method_factory import create_method
from megatron_ext.types import Problem, Sample
from tests import warm
from tools import methods, train

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "own-code.md"
SMALL = (
    *("train.steps=2", "rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2", "checkpoint.every=0"),
    *("parallel.tensor=1", "log.trackers=[]"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document's code blocks as files, below a folder that is on no path."""
    path = tmp_path_factory.mktemp("own")
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for name, text in blocks:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text.replace("PATH/TO", str(ROOT)))
    return path


def test_the_package_trains_the_tiny_recipe_on_two_ranks(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tools.train", "my_recipe.toml", *SMALL]
    done = warm.run(command, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "mine"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    traced = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    assert len(traced) == 2 * 4 * 4 and {line["version"] for line in traced} == {0, 1}
    for step in steps:
        outcomes = {name: value for name, value in step.items() if name.startswith("reward/outcome/")}
        assert sum(outcomes.values()) == pytest.approx(1) and "reward/outcome/error" not in outcomes
        assert (
            outcomes.get("reward/outcome/other", 0) == step["response/truncated"]
        )  # the function's own word, "unfinished"
        assert step["reward/mean"] < outcomes["reward/outcome/correct"] or step["reward/mean"] == 0  # shorter is better
    assert sum(step["reward/outcome/correct"] for step in steps) > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.margn=0.1", "method.margn: my_package.method:PositiveOnly has no such option; did you mean margin?"),
        ('method.margin="0.1"', "method.margin: found '0.1', expected a valid number"),
        ("method.margin=-1", "method.margin: found -1, expected a number of at least 0"),
        ("reward.options={per_tokn=0.1}", "reward.options.per_tokn: my_package.reward:short_and_right has no such"),
        ("reward.options={per_token=true}", "reward.options.per_token: found True, expected a valid number"),
        ("rollout.options={fil='x'}", "rollout.options.fil: my_package.engine:TRACED has no such option; did you"),
        ("rollout.options={}", "rollout.options.file: missing; my_package.engine:TRACED has no default for it"),
        ("method.name=my_package.methods:PositiveOnly", "method.name: no module my_package.methods is found; install"),
        ("method.name=my_package.method:PositiveOnl", "defines no PositiveOnl; did you mean PositiveOnly?"),
        ("method.name=my_package.reward:short_and_right", "expected a class derived from megatron_ext.methods.base"),
        ("reward.function=my_package/rewards.py:score", "no such file:"),
        ("rollout.engine=my_package.engine:Options", "expected a megatron_ext.rollout.engine_spec.EngineSpec"),
    ],
)
def test_a_fault_is_refused_like_ours(
    folder: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(folder)
    assert train.main([str(folder / "my_recipe.toml"), *SMALL, override, "--print-config"]) == 2
    assert message in capsys.readouterr().err


def test_a_listing_names_the_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(folder)
    assert methods.main(["my_package.method:PositiveOnly"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("my_package.method:PositiveOnly: GRPO that learns from advantages above")
    assert "  margin: float = 0.0\n" in listed and "  clip_low: float = 0.2\n" in listed


def test_code_in_a_file_beside_the_recipe(folder: Path) -> None:
    (folder / "beside.py").write_text("def one(problem, response):\n    return 1.0\n")
    recipe = folder / "beside.toml"
    recipe.write_text(f'parent = "{ROOT}/recipes/tiny/tiny-cpu.toml"\n[reward]\nfunction = "beside.py:one"\n')
    config = load_config(recipe)
    assert config.reward.function == f"{folder}/beside.py:one"
    assert find_reward(config.reward)(None, None) == 1.0


def test_nothing_else_in_a_recipe_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all keys that hold text, four are KEYS; whatever the others say, no module of the folder is loaded."""
    monkeypatch.syspath_prepend(folder)
    (folder / "trap.py").write_text("raise SystemExit('imported')\n")
    texts = [key for key in keys(Config) if isinstance(_value(key), str)]
    assert {*map(".".join, KEYS)} - {"method.name"} <= {*texts}
    for key in {*texts} - {*map(".".join, KEYS)}:
        recipe = folder / "trap.toml"
        section, _, last = key.rpartition(".")
        head = f"[{section}]\n" if section else ""
        recipe.write_text(f'parent = "{ROOT}/recipes/tiny/tiny-cpu.toml"\n{head}{last} = "trap:Name"\n')
        with contextlib.suppress(ConfigError):
            create_method(load_config(recipe))
        assert "trap" not in sys.modules, key


def _value(key: str) -> object:
    found: object = Config()
    for name in key.split("."):
        found = getattr(found, name)
    return found


def answer(text: str, *, truncated: bool = False) -> tuple[Problem, Sample]:
    return Problem("a", "", "7"), Sample((1,), tuple(range(len(text))), (0.0,) * len(text), text, truncated, 0)


FUNCTION = """
import os, time
from megatron_ext.records import Reward

def score(problem, response, *, scale: float = 1.0):
    if response.text == "slow":
        time.sleep(60)
    if response.text == "die":
        os._exit(1)
    if response.text == "word":
        return Reward(0.25, "compiles", "x")
    if response.text == "raise":
        raise KeyError("tests")
    return {"nan": float("nan"), "text": "1"}.get(response.text, scale * len(response.token_ids) / 4)
"""


def test_a_reward_sees_tokens_and_its_faults_cost_one_response(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTION)
    reward = RewardConfig(function=f"{tmp_path}/own.py:score", deadline_s=3, options={"scale": 1.0}, wrong=-1.0)
    with FunctionPool(reward, 2) as pool:
        asked = ("four", "ab", "slow", "die", "word", "raise", "nan", "text")
        found = pool.score_samples([answer(text) for text in asked])
        with pytest.raises(VerifierError, match="at least 5 of 20 answers got no verdict.*KeyError: 'tests'"):
            pool.score_samples([answer("raise")] * 5 + [answer("ab" * n) for n in range(15)])
    assert [(reward.value, reward.outcome) for reward in found] == [
        *((1.0, "correct"), (0.5, "other"), (-1.0, "timeout"), (-1.0, "crashed"), (0.25, "compiles")),
        *((-1.0, "error"), (-1.0, "error"), (-1.0, "error")),
    ]
    assert found[5].extracted == "KeyError: 'tests'" and found[4].extracted == "x"
    assert [counted(reward.outcome) for reward in found[3:6]] == [Outcome.CRASHED, Outcome.OTHER, Outcome.ERROR]


LEAVING = """
import subprocess

def score(problem, response):
    child = subprocess.Popen(["sleep", "1000"])
    print(child.pid, file=open(problem.answer, "w"))
    child.wait()
"""


def test_what_a_reward_has_started_ends_with_its_worker(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LEAVING)
    reward = RewardConfig(function=f"{tmp_path}/own.py:score", deadline_s=3)
    problem, [_, sample] = Problem("a", "", str(tmp_path / "pid")), answer("code")
    with FunctionPool(reward, 1) as pool:
        assert pool.score_samples([(problem, sample)])[0].outcome == Outcome.TIMEOUT
    child, end = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while Path(f"/proc/{child}/status").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_that_does_not_read_its_question_is_late(tmp_path: Path) -> None:
    """A long response does not fit into a pipe."""
    (tmp_path / "own.py").write_text(FUNCTION)
    reward = RewardConfig(function=f"{tmp_path}/own.py:score", deadline_s=3)
    with FunctionPool(reward, 1) as pool:
        assert pool.score_samples([answer("four")])[0].outcome == "correct"
        os.kill(pool._workers[0]._process.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert pool.score_samples([answer("ab" * 100_000)])[0].outcome == Outcome.TIMEOUT
        assert time.monotonic() - start < 30
        assert pool.score_samples([answer("ab" * 100_000)])[0].value == 50_000.0


def test_a_reward_worker_starts_without_torch() -> None:
    code = "import sys; import megatron_ext.rollout.rewards.function_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

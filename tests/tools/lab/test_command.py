"""The lab: what it plans, how it does its jobs, and that a stopped lab continues."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.config.errors import ConfigError
from tests import warm
from tools.lab import command as lab
from tools.lab import runs as lab_runs
from tools.lab.plan import Job, jobs, load_plan

ROOT = Path(__file__).parents[3]
PLAN = ROOT / "recipes/lab/lab.toml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# --- the plan ---


def test_every_run_of_the_plan_is_valid_and_a_new_method_adds_none(tmp_path: Path) -> None:
    plan = load_plan(PLAN)
    assert plan.exact_table
    assert [run.name for run in plan.runs] == [entry["name"] for entry in tomllib.loads(PLAN.read_text())["run"]]
    planned = jobs(plan, tmp_path)  # raises for an override that no configuration takes
    assert len({job.name for job in planned}) == len(planned) == 1 + plan.seeds * len(plan.runs)
    from megatron_ext import methods
    from tools.lab.plan import configuration

    for run in plan.runs:
        methods.create(configuration(plan, run, 0, tmp_path)[0].method)  # and that no method takes


def test_a_method_that_the_plan_does_not_mention_runs_with_its_own_recipe(tmp_path: Path) -> None:
    path = write_plan(tmp_path, runs='[[run]]\nname = "siren"\nfamily = "one"\n')
    found = {run.name: run for run in load_plan(path).runs}
    assert found["siren"].family == "one" and found["grpo"].recipe == Path("recipes/grpo/grpo-tiny-cpu.toml")


def test_a_plan_with_keys_missing_or_unknown_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_plan(tmp_path, runs='[[run]]\nname = "grpo"\nfamily = "one"\n').read_text()
    for text, message in (
        (good.replace('title = "A lab"\n', "").replace("seeds = 2\n", ""), "missing keys seeds, title"),
        (good + '[[curve]]\nkey = "entropy/full"\ntitel = "x"\n', "curve entropy/full: expected key and title"),
    ):
        (tmp_path / "faulty.toml").write_text(text)
        assert lab.main(["--plan", str(tmp_path / "faulty.toml"), "--dry-run"]) == 2
        assert message in capsys.readouterr().err


def test_like_takes_over_what_comes_first_and_start_waits_for_a_model(tmp_path: Path) -> None:
    runs = """
[[run]]
name = "aer"
family = "one"
set = ["method.tau=0.5", "method.eta=0.1"]
[[run]]
name = "again"
like = "aer"
set = ["method.eta=0.2"]
start = "grpo"
first_seed = 50
family = "one"
"""
    plan = load_plan(write_plan(tmp_path, runs=runs)).select(["again"])
    assert [run.name for run in plan.runs] == ["again", "grpo"]
    base, model, again, *others = jobs(plan, tmp_path / "runs")
    assert "train.seed=0" in model.commands[0] and "train.seed=50" in again.commands[0]
    assert (base.name, model.name, again.name, again.needs) == ("base", "grpo-s0", "again-s0", "grpo-s0")
    train, export, evaluate = again.commands
    assert train[1] == "recipes/aer/aer-tiny-cpu.toml"
    overrides = [word for word in train if word.startswith("method.") or word.startswith("model.")]
    assert overrides[:3] == ["method.tau=0.5", "method.eta=0.1", "method.eta=0.2"]
    assert overrides[3] == f'model.path="{tmp_path}/runs/grpo-s0/hf"'
    assert export[-1] == evaluate[1] == f"{tmp_path}/runs/again-s0/hf"
    assert others[1].needs == "grpo-s1"  # every seed starts from a model of its own


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ('[[run]]\nname = "aer"\nfamily = "none"\n', "family"),
        ('[[run]]\nname = "aer"\nfamily = "one"\nlike = "later"\n', "like 'later'"),
        ('[[run]]\nname = "aer"\nfamily = "one"\ntypo = 1\n', "typo"),
        ('[[run]]\nname = "aer"\nfamily = "one"\nstart = "nobody"\n', "start"),
    ],
)
def test_a_faulty_plan_is_refused(tmp_path: Path, runs: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_plan(write_plan(tmp_path, runs=runs))


def test_a_pattern_that_matches_nothing_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main(["--only", "sirene", "--dry-run"]) == 2
    assert "'sirene'" in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    plan = load_plan(PLAN).select(["grpo"])
    from tools.lab.plan import configuration

    config, _ = configuration(plan, plan.runs[0], 0, tmp_path)
    (tmp_path / "grpo-s0").mkdir()
    saved = config.model_dump(mode="json")
    (tmp_path / "grpo-s0/config.json").write_text(json.dumps(saved | {"alarms": None}))
    jobs(plan, tmp_path)
    (tmp_path / "grpo-s0/config.json").write_text(json.dumps(saved | {"train": saved["train"] | {"steps": 7}}))
    with pytest.raises(ConfigError, match=r"train.steps: was 7"):
        jobs(plan, tmp_path)


def write_plan(folder: Path, *, runs: str, steps: int = 3) -> Path:
    path = folder / "plan.toml"
    path.write_text(
        'title = "A lab"\nclaims = "recipes/lab/claims.toml"\n'
        'every_method = true\nexact_table = true\nseeds = 2\nbaseline = "grpo"\n'
        f'set = ["parallel.ranks_per_node=1", "parallel.tensor=1", "train.steps={steps}", "log.trackers=[]", '
        '"rollout.prompts=4", "train.mini_batch_prompts=4", "rollout.samples=2", "checkpoint.every=1"]\n'
        'evaluate = ["--data=recipes/tiny/data/eval.jsonl", "--samples=2", "--limit=3", "--max-response-tokens=16", '
        '"--workers=1"]\n[families]\none = "One"\nother = "Other"\n' + runs
    )
    return path


# --- the jobs ---

COMMAND = """
import json, os, signal, sys, time
def main(arguments):
    folder, what = arguments
    open(f"{folder}/order", "a").write(f"{what} {time.monotonic()} ")
    if what == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("waiting", flush=True)
        time.sleep(60)
    if what == "meet":
        from megatron_ext import cpu_compat
        from megatron_ext.config.schema import ParallelConfig
        from megatron_ext.model import parallel
        cpu_compat.enter()
        parallel.initialize(ParallelConfig(ranks_per_node=1))
    if what == "last":
        open(f"{folder}/evaluation.json", "w").write("{}")
    open(f"{folder}/order", "a").write(f"{time.monotonic()}\\n")
    return 3 if what == "fail" else 0
"""


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    (tmp_path / "lab_test_command.py").write_text(COMMAND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lab_runs, "POLL_S", 0.01)
    monkeypatch.setattr(lab_runs, "module_of", str)  # a module of its own instead of a tool

    def make(name: str, *what: str, needs: str | None = None) -> Job:
        folder = tmp_path / name
        return Job(name, folder, tuple(("lab_test_command", str(folder), word) for word in what), 5, needs)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def said(job: Job) -> list[str]:
    path = job.folder / "order"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_jobs_are_done_once_and_in_the_order_of_their_models(make_job) -> None:
    follower = make_job("b", "first", "last", needs="a")
    leader, other = make_job("a", "first", "last"), make_job("c", "last")
    todo = [follower, leader, other]
    seen = []
    outcome = lab_runs.work(todo, 2, lambda running: seen.append(len(running)))
    assert not outcome.failed and not outcome.interrupted and max(seen) == 2
    assert all(job.finished for job in todo) and said(leader) == ["first", "last"] == said(follower)
    times = {job.name: [float(t) for t in (job.folder / "order").read_text().split() if t[0].isdigit()] for job in todo}
    assert max(times["a"]) <= min(times["b"])
    assert not lab_runs.work(todo, 2, lambda _: None).failed
    assert said(leader) == ["first", "last"]  # not again


def test_a_job_that_fails_is_named_and_the_others_go_on(make_job) -> None:
    bad, waiting, good = (
        make_job("bad", "fail", "last"),
        make_job("waiting", "last", needs="bad"),
        make_job("g", "last"),
    )
    outcome = lab_runs.work([bad, waiting, good], 1, lambda _: None)
    assert [(job.name, why) for job, why in outcome.failed] == [
        ("bad", "lab_test_command ended with 3"),
        ("waiting", "bad, from which it starts, is not finished"),
    ]
    assert good.finished and not waiting.folder.exists()


def test_a_signal_asks_the_children_to_save_and_ends_the_lab(make_job) -> None:
    job, next_job = make_job("a", "wait", "last"), make_job("b", "last")

    def stop_when_it_runs(_: object) -> None:
        log = job.folder / lab_runs.LOG
        if log.exists() and "waiting" in log.read_text():
            os.kill(os.getpid(), signal.SIGTERM)

    start = time.monotonic()
    outcome = lab_runs.work([job, next_job], 1, stop_when_it_runs)
    assert outcome.interrupted and not outcome.failed and time.monotonic() - start < 30
    assert said(job) == ["wait"] and not next_job.folder.exists()


def test_a_port_that_another_process_took_ends_no_job(make_job, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(lab_runs, "free_port", lambda: taken.getsockname()[1])
        job = make_job("a", "meet", "last")
        assert not lab_runs.work([job], 1, lambda _: None).failed, (job.folder / lab_runs.LOG).read_text()
    assert job.finished


def test_two_labs_do_not_share_a_folder(tmp_path: Path) -> None:
    with lab_runs.alone(tmp_path), pytest.raises(ConfigError, match="another lab"), lab_runs.alone(tmp_path):
        pass
    with lab_runs.alone(tmp_path):
        pass


# --- the whole ---


def test_a_lab_that_is_stopped_continues_and_writes_its_page(tmp_path: Path) -> None:
    path = write_plan(tmp_path, runs='[[run]]\nname = "grpo"\nfamily = "one"\n', steps=12)
    command = [sys.executable, "-m", "tools.lab", "--plan", str(path), "--dir", str(tmp_path / "runs")]
    command += ["--only", "grpo", "--seeds", "1", "--jobs", "1"]
    metrics = tmp_path / "runs/grpo-s0/metrics.jsonl"
    first = warm.popen([*command, "--steps", "12"], cwd=ROOT, stdin=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()  # the parent alone: the kernel asks its child
    first.wait()
    wait_until_free(tmp_path / "runs")
    done = metrics.read_text().count("\n")
    assert done < 12
    assert warm.popen([*command, "--steps", "12"], cwd=ROOT, stdin=subprocess.DEVNULL).wait() == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert "resuming after step" in (tmp_path / "runs/grpo-s0/log.txt").read_text()
    assert not (tmp_path / "runs/grpo-s0/checkpoints").exists()
    assert "GRPO" in (tmp_path / "runs/index.html").read_text() and (tmp_path / "runs/README.md").exists()


def wait_until_free(folder: Path) -> None:
    for _ in range(600):
        try:
            with lab_runs.alone(folder):
                return
        except ConfigError:
            time.sleep(0.1)
    raise AssertionError("the child of the killed lab did not end")

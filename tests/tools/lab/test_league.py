"""The league: its plan, and what its trials choose."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_ext import methods
from megatron_ext.config.errors import ConfigError
from tests.tools.lab.plans import FALLING, PLAN, ROOT, TUNING, plan_with
from tests.tools.lab.saved import save_run
from tests.tools.lab.test_claims import result, seed
from tools.lab import command as lab
from tools.lab.league import setting_of
from tools.lab.plan import configuration, jobs, load_plan
from tools.lab.regimes import in_regime
from tools.lab.results import Result
from tools.lab.store import collect
from tools.lab.tuning import Choice, best, tuned_name

REGIMES = ("off-policy", "lag-4", "on-policy")  # that every method is in
SETTINGS = ("", "tuned")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# --- the plan ---


def test_every_method_runs_in_every_regime_in_both_settings(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, {name: 1 + i % 3 for i, name in enumerate(methods.METHODS)})
    runs = {run.name: run for run in plan.runs}
    assert len(runs) == len(plan.runs) and not plan.waiting
    for name in methods.METHODS:
        for regime in REGIMES:
            found = [runs[in_regime(tuned_name(name) if setting else name, regime)] for setting in SETTINGS]
            configs = [configuration(plan, run, 0, tmp_path)[0] for run in found]
            for config in configs:
                assert config.method["name"] == name and config.rollout.samples == 8
                assert config.rollout.prompts * config.train.steps == 32 * 60  # the same problems
                assert config.updates_per_step * config.train.steps == 4 * 60  # in as many updates
                assert (config.updates_per_step == 1) == (regime == "on-policy")
                assert config.rollout.max_lag == (4 if regime == "lag-4" else 0)
                assert config.model.path == "recipes/tiny/base"
            assert configs[0].method != configs[1].method, f"{name}: its tuned run is its own"
    again = {run.regime: run for run in plan.runs if run.base == "grpo_again"}
    assert {run.first_seed for run in again.values()} == {100} and set(REGIMES) <= again.keys()


def test_every_run_is_valid_and_no_regime_changes_a_method(tmp_path: Path) -> None:
    plan = load_plan(PLAN)
    options = dict[str, dict]()
    for run in plan.runs:
        config, _ = configuration(plan, run, 0, tmp_path)
        method = dict(config.method)
        for key in ("critic_only_steps", "anneal_steps"):  # in steps, of which an on-policy run has four times as many
            if key in method:
                method[key] = Fraction(method[key], config.train.steps)
        method.setdefault("critic_only_steps", Fraction(10, 60))
        name = run.name.partition("@")[0]
        assert options.setdefault(name, method) == method, run.name
        if run.regime == "experts":
            assert config.model.path == "recipes/tiny/moe" and config.rollout.routing_replay
    assert {run.base for run in plan.runs if run.regime == "experts"} == {"grpo", "grpo_again", "clip_higher", "aer"}


def test_every_method_has_the_same_number_of_trials_on_a_seed_of_their_own(tmp_path: Path) -> None:
    plan = load_plan(PLAN)
    trials = [run for run in plan.runs if run.setting == "trial"]
    assert plan.tuning is not None and plan.tuning.budget == 3
    for name in methods.METHODS:
        own = [run for run in trials if run.base == name]
        assert [run.name for run in own] == [f"{name}.trial{i}@off-policy" for i in range(4)]
        seen = [configuration(plan, run, 0, tmp_path)[0].method for run in own]
        assert all(seen.count(options) == 1 for options in seen), f"{name}: two trials are the same"
        assert set(own[0].set) == set(next(run for run in plan.runs if run.name == f"{name}@off-policy").set)
    used = {run.first_seed + i for run in plan.runs if run.setting != "trial" for i in range(plan.seeds)}
    assert {run.first_seed for run in trials} == {200} and 200 not in used
    assert {len(plan.seeds_of(run)) for run in trials} == {1}


def test_the_jobs_come_in_the_order_of_what_they_tell(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, {"siren": 1, "aer": 0})
    planned = jobs(plan, tmp_path / "runs")[1:]
    groups = list(dict.fromkeys(job.group for job in planned))
    own = ["off-policy", "lag-4", "on-policy", "off-policy, trial", "off-policy, schedule", "experts"]
    assert groups == [*own, "off-policy, tuned", "lag-4, tuned", "on-policy, tuned"]
    assert len({job.name for job in planned}) == len(planned)
    first = [job.name for job in planned[:128]]
    assert first[0] == "grpo@off-policy-s0" and first[32] == "grpo@off-policy-s1" and first[127].endswith("-s3")
    assert [job.name for job in planned if job.group == "lag-4, tuned"] == [f"siren.tuned@lag-4-s{i}" for i in range(4)]
    assert plan.waiting.startswith("The tuned runs of grpo, dr_grpo, ") and " siren," not in plan.waiting


def test_a_run_of_a_regime_has_a_name_for_files_and_patterns(tmp_path: Path) -> None:
    plan = load_plan(PLAN)
    assert [run.name for run in plan.select(["siren@lag-4"]).runs] == ["siren@lag-4"]
    assert {run.regime for run in plan.select(["*@on-policy"]).runs} == {"on-policy"}
    assert all(re.fullmatch(r"[\w.@-]+", run.name) for run in plan.runs)


def test_dry_run_says_how_much_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plan", str(PLAN), "--dir", str(tmp_path), "--dry-run", "--only", "grpo@*", "grpo.trial*"]
    save_run(tmp_path, "grpo@off-policy-s0", entropy=FALLING)  # 2 s a step of 32 prompts
    collect(load_plan(PLAN).select(["grpo@off-policy"]), tmp_path, tmp_path)
    assert lab.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    # an evaluation is as long as 8 steps of 32 prompts: 3 runs of 68 steps of 2 s; on-policy steps have 8 prompts
    assert f"off-policy: 4 jobs, 3 to do, 180 training steps, about {3 * 68 * 2 / 3600:.1f} core hours" in said
    assert f"on-policy: 4 jobs, 4 to do, 960 training steps, about {4 * 68 * 2 / 3600:.1f} core hours" in said
    assert said[-1].startswith("21 jobs, 20 to do, ") and f"{tmp_path}/results" in said[-1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'runs = ["grpo", "grpo_again", "clip_higher", "aer"]',
            'runs = ["nobody"]',
            "experts: no run is called nobody",
        ),
        ('regimes = ["off-policy"]', 'regimes = ["nowhere"]', "no regime is called nowhere"),
        ('name = "lag-4"', 'name = "off-policy"', "regime 'off-policy': expected a name of its own"),
        ('name = "lag-4"', 'name = "a@b"', "regime 'a@b'"),
        ('title = "Off-policy', 'titel = "', "regime off-policy: expected name and title"),
        ('name = "siren"\n', 'name = "siren_2"\nmethod = "siren"\n', "that the plan has not: siren"),
        ('tuning = "recipes/league/tuning.toml"', 'tuning = "nowhere.toml"', "no such file"),
    ],
)
def test_a_faulty_league_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_with(tmp_path, {}, PLAN.read_text().replace(old, new))


def test_a_budget_is_everybody_s(tmp_path: Path) -> None:
    text = TUNING.read_text().replace(', ["method.coef=0.15"]]', "]")
    assert text != TUNING.read_text()
    (tmp_path / "tuning.toml").write_text(text)
    with pytest.raises(ConfigError, match="axis of siren: found 2 trials, expected 3"):
        plan_with(tmp_path, {}, PLAN.read_text().replace("recipes/league/tuning.toml", f"{tmp_path}/tuning.toml"))


# --- the choice ---


def trial(right: float, late: float) -> Result:
    reward, entropy = [0.0] * 6 + [right] * 3, [0.45] * 6 + [late] * 3
    return result("x", seed(0, reward__outcome__correct=reward, entropy__full=entropy))


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([(0.30, 0.2), (0.35, 0.1), (0.32, 0.4), (0.20, 0.4)], 1),  # right answers decide
        ([(0.345, 0.2), (0.35, 0.1), (0.341, 0.3), (0.20, 0.4)], 2),  # within a point of the best: fewest nats lost
        ([(0.339, 0.4), (0.35, 0.1), (0.30, 0.4), (0.20, 0.4)], 1),  # more than a point below
        ([(0.35, 0.2), (0.35, 0.2), (0.35, 0.2), (0.35, 0.2)], 0),  # nothing to choose: the paper's
        ([(0.35, 0.40), (0.35, 0.46), (0.35, 0.9), (0.30, 0.2)], 1),  # more entropy than at the start is no merit
    ],
)
def test_the_best_trial_by_hand(trials: list[tuple[float, float]], chosen: int) -> None:
    choice = best([trial(*each) for each in trials])
    assert choice.trial == chosen and choice.right == tuple(right for right, _ in trials)
    assert choice.lost == pytest.approx([max(0.0, 0.45 - late) for _, late in trials])


def test_trials_choose_and_the_plan_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_with(tmp_path, {})
    runs, arguments = tmp_path / "runs", ["--plan", str(tmp_path / "league.toml"), "--dir", str(tmp_path / "runs")]
    arguments += ["--only", "siren*", "aer*", "--choose"]
    for i, reward in enumerate((0.3, 0.3, 0.4, 0.2)):
        save_run(runs, f"siren.trial{i}@off-policy-s0", entropy=FALLING, reward=reward)
    for i in range(3):  # one is missing
        save_run(runs, f"aer.trial{i}@off-policy-s0", entropy=FALLING)
    assert lab.main(arguments) == 0
    assert "siren: method.coef=0.05\n" in capsys.readouterr().out
    plan = load_plan(tmp_path / "league.toml")
    assert plan.tuning is not None
    assert plan.tuning.chosen == {"siren": Choice(2, (0.3, 0.3, 0.4, 0.2), (0.2, 0.2, 0.2, 0.2))}
    tuned = [run for run in plan.runs if run.setting == "tuned"]
    assert [run.name for run in tuned] == [f"siren.tuned@{regime}" for regime in REGIMES]
    save_run(runs, "aer.trial3@off-policy-s0", entropy=FALLING, reward=0.5)
    assert lab.main([*arguments[:-3], "aer*", "--choose"]) == 0  # what was chosen before stays
    chosen = load_plan(tmp_path / "league.toml").tuning
    assert chosen is not None and {run: choice.trial for run, choice in chosen.chosen.items()} == {"aer": 3, "siren": 2}
    assert configuration(plan, tuned[0], 0, tmp_path)[0].method["coef"] == 0.05
    chosen = (tmp_path / "chosen.toml").read_text()
    (tmp_path / "chosen.toml").write_text(chosen.replace("coef=0.05", "coef=0.06"))
    with pytest.raises(ConfigError, match=r"siren: chosen was \['method.coef=0.06'\]"):
        load_plan(tmp_path / "league.toml")


def test_where_the_paper_s_values_are_the_best_nothing_runs_again(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, {"siren": 1, "aer": 0})
    said = {run.name: setting_of(plan, run) for run in plan.runs if run.setting != "trial"}
    assert said["aer@lag-4"] == "paper's, tuned alike" and "aer.tuned@lag-4" not in said
    assert said["siren@lag-4"] == "paper's" and said["siren.tuned@lag-4"] == "tuned: coef=0.015"


def test_a_choice_needs_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(tmp_path, {})
    assert lab.main(["--plan", str(tmp_path / "league.toml"), "--dir", str(tmp_path / "x"), "--choose"]) == 2
    assert "no run has all its trials finished" in capsys.readouterr().err
    assert lab.main(["--dir", str(tmp_path / "x"), "--choose"]) == 2
    assert "no tuning" in capsys.readouterr().err

"""The league: its plan, what its trials choose, how runs follow their targets, and its page."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

from megatron_ext import methods
from megatron_ext.config.errors import ConfigError
from megatron_ext.methods.base import Controller
from tests.tools.lab.saved import save_run
from tests.tools.lab.test_claims import result, seed
from tools.lab import command as lab
from tools.lab.following import overshoot, settling_step, tracking_error
from tools.lab.league import following, league, scalability, setting_of, sharpening_tax
from tools.lab.league_page import write
from tools.lab.page import pace
from tools.lab.plan import BASE, LabPlan, configuration, jobs, load_plan
from tools.lab.regimes import in_regime
from tools.lab.results import Result, load
from tools.lab.store import collect, left_to_do
from tools.lab.tuning import Choice, best, tuned_name

ROOT = Path(__file__).parents[3]
PLAN = ROOT / "recipes/league/league.toml"
TUNING = ROOT / "recipes/league/tuning.toml"
REGIMES = ("off-policy", "lag-4", "on-policy")  # that every method is in
SETTINGS = ("", "tuned")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_with(folder: Path, chosen: dict[str, int], text: str = "") -> LabPlan:
    """The league's plan, or one of ``text``, of which these trials are chosen."""
    axes = {axis["run"]: axis["trials"] for axis in tomllib.loads(TUNING.read_text())["axis"]}
    lines = []
    for run, trial in chosen.items():
        overrides = axes[run][trial - 1] if trial else []
        lines += [f"[run.{run}]", f"trial = {trial}", f"set = {json.dumps(overrides)}", "right = []", "lost = []"]
    (folder / "chosen.toml").write_text("\n".join(lines))
    content = text or PLAN.read_text()
    assert content.count("recipes/league/chosen.toml") == 1
    (folder / "league.toml").write_text(content.replace("recipes/league/chosen.toml", f"{folder}/chosen.toml"))
    return load_plan(folder / "league.toml")


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

FALLING = [0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.18, 0.2, 0.22]  # loses .2 nats
FLAT = [0.4] * 9


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
    assert said["siren@lag-4"] == "paper's" and said["siren.tuned@lag-4"] == "tuned: method.coef=0.015"


def test_a_choice_needs_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(tmp_path, {})
    assert lab.main(["--plan", str(tmp_path / "league.toml"), "--dir", str(tmp_path / "x"), "--choose"]) == 2
    assert "no run has all its trials finished" in capsys.readouterr().err
    assert lab.main(["--dir", str(tmp_path / "x"), "--choose"]) == 2
    assert "no tuning" in capsys.readouterr().err


# --- targets ---


def test_following_a_fixed_target_by_hand() -> None:
    measured, target = [0.5, 0.4, 0.3, 0.2, 0.22, 0.27, 0.26, 0.24, 0.25], [0.25] * 9
    assert tracking_error(measured, target) == pytest.approx((0.01 + 0.01 + 0) / 3 / 0.25)  # the last three
    assert overshoot(measured, target) == pytest.approx(0.05 / 0.25)  # .2, below: it came from above
    assert settling_step(measured, target) == 6
    assert settling_step([*measured[:8], 0.3], target) is None  # the last step is outside
    assert settling_step([*[0.5] * 6, 0.25, 0.25, 0.25], target) == 7  # the whole last third
    assert settling_step([*[0.5] * 7, 0.25, 0.25], target) is None  # crossed at the end
    assert overshoot([0.1, 0.2, 0.26, 0.24, 0.3], [0.25] * 5) == pytest.approx(0.2)  # from below
    assert overshoot([0.5, 0.4, 0.3], [0.25] * 3) is None  # never reached
    assert overshoot([0.25, 0.4, 0.1], [0.25] * 3) is None  # from neither side
    assert overshoot([0.27, 0.4, 0.1], [0.25] * 3) is None  # 8 % off: chance decided the side
    assert overshoot([0.3, 0.25, 0.26], [0.25] * 3) == 0.0
    assert tracking_error([None] * 3, [0.25] * 3) is None and settling_step([None, None], [0.25] * 2) is None
    assert settling_step([0.1, None, 0.25], [0.25] * 3) == 3
    assert settling_step([0.1, 0.25, None, 0.25, None, 0.25], [0.25] * 6) == 2


def test_a_moving_target_is_read_step_by_step() -> None:
    target = [0.5, 0.45, 0.4, 0.35, 0.3, 0.25]
    measured = [0.6, 0.5, 0.37, 0.35, 0.312, 0.25]
    assert overshoot(measured, target) == pytest.approx(0.075)  # .37 where .4 was asked; beside .25 there is none
    assert tracking_error(measured, target) == pytest.approx((0.04 + 0) / 2)
    assert settling_step(measured, target) == 3  # .5 is 11 % above .45
    moving = Controller(measured="h", target="goal")
    run = result("x", seed(0, h=measured, goal=target), seed(1, h=target, goal=target), controller=moving)
    assert run.target_curves == [target, target]
    grpo = result("grpo", seed(0, entropy__full=[0.6] * 4 + [0.36, 0.25]), seed(2, entropy__full=[0.6] * 6))
    assert following(run, grpo)[1] == "-"  # it measures another entropy
    both = (seed(i, h=own, goal=target, entropy__full=own) for i, own in enumerate((measured, target)))
    run = result("x", *both, controller=moving)
    error, without, beyond, settles = following(run, grpo)
    assert (error, beyond, settles) == ("1.0 ± 1.4", "7.5 (1 of 2 seeds)", "2 ± 1")
    assert without == "10.0"  # .36 where .3 was asked, and .25: of the seed that both have
    fixed = result("y", seed(0, h=[0.5, 0.2]), controller=Controller(measured="h", target=0.25))
    assert fixed.target_curves == [[0.25, 0.25]] and following(fixed, None)[1] == "-" == following(run, run)[1]
    assert following(result("z", seed(0, h=[1.0])), grpo) == ["-"] * 4


def test_overshoot_and_settling_are_of_means_over_a_twelfth_of_the_run() -> None:
    """A step's noise of a fifth around the target settles nothing step by step, and is nothing over five steps."""
    target = [0.25] * 60
    noise = [0.05 * (-1) ** i for i in range(60)]
    measured = [0.5 - 0.25 * min(1, i / 20) + noise[i] for i in range(60)]
    assert settling_step(measured, target) == 21  # windows begin at 1, 6, 11, 16 (means .275 and more), 21
    excess = overshoot(measured, target)
    assert excess is not None and excess == pytest.approx(0.01 / 0.25)  # of five alternating steps one is left over
    assert tracking_error(measured, target) == pytest.approx(0.2)
    assert settling_step([*measured[:55], *[0.3] * 5], target) is None
    small = [value for value in measured for _ in range(4)]  # four times the steps: the same windows
    assert settling_step(small, [0.25] * 240) == 81 and overshoot(small, [0.25] * 240) == pytest.approx(excess)


# --- the sharpening tax ---


def test_scalability_is_the_paper_s_by_exact_arithmetic() -> None:
    counts, n = [0, 1, 3, 16], 16

    def passed(k: int) -> Fraction:
        return sum((1 - Fraction(comb(n - c, k), comb(n, k)) for c in counts), Fraction()) / len(counts)

    area = sum((passed(n) - passed(k) for k in range(1, n)), Fraction())
    own = seed(0, counts, n)
    assert scalability(own) == pytest.approx(float(area / ((n - 1) * (1 - passed(1)))), abs=1e-12)
    assert scalability(seed(0, [16, 16], 16)) is None  # nothing is left to solve
    sharp = seed(1, [0, 0, 16, 16], 16)  # always or never: further tries are worth nothing
    assert scalability(sharp) == 0.0
    assert sharpening_tax(result("x", sharp), own) == pytest.approx([scalability(own)])
    other = result("x", sharp)
    other = replace(other, run=replace(other.run, set=('model.path="recipes/tiny/moe"',)))
    assert sharpening_tax(other, own) == [] == sharpening_tax(result("x", sharp), None)


# --- the page ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four seeds of three runs off-policy, one of a schedule and one of lag."""
    for number in range(4):
        save_run(tmp_path, f"grpo@off-policy-s{number}", entropy=FALLING, right=2)
        save_run(tmp_path, f"grpo_again@off-policy-s{number}", entropy=FALLING, right=(1, 3, 2, 2)[number])
        name = f"aer@off-policy-s{number}"
        save_run(tmp_path, name, entropy=FLAT, right=3, aer__entropy=0.4, aer__target=0.32, time__step_s=3.0)
        save_run(tmp_path, f"psr@off-policy-s{number}", entropy=FALLING, right=0)
    save_run(tmp_path, "aer@lag-4-s0", entropy=FLAT, aer__entropy=0.4, aer__target=0.32)
    goal = [0.4 - 0.02 * i for i in range(9)]
    save_run(
        tmp_path, "entropic.linear@off-policy-s0", entropy=[1.1 * x for x in goal], curves={"entropy/target": goal}
    )
    save_run(tmp_path, BASE, entropy=FLAT, right=1)
    collect(load_plan(PLAN), tmp_path, tmp_path)
    return tmp_path


def test_the_table_says_what_differs_and_of_the_null_control_nothing(folder: Path) -> None:
    plan = load_plan(PLAN)
    found = league(plan, load(plan, folder))
    rows = {row.result.run.base: row for row in found["off-policy"]}
    assert list(rows) == ["aer", "grpo", "grpo_again", "psr"]  # by avg: 87.5, 75, 75, 50
    assert rows["grpo"].avg is None and rows["grpo_again"].is_null and not rows["aer"].is_null
    aer, psr, again = (rows[name].avg for name in ("aer", "psr", "grpo_again"))
    assert aer is not None and psr is not None and again is not None
    assert again.verdict == "not decided" and again.effect.seeds == (-0.125, 0.125, 0.0, 0.0)
    assert aer.effect.mean == 0.125 and psr.effect.mean == -0.25
    # .25 more of the first problem, none of the second: the seeds agree, the problems do not
    assert aer.verdict == "not decided" and aer.effect.error == pytest.approx(math.sqrt(0.03125 / 2))
    [row] = found["lag-4"]
    assert row.avg is None and found["experts"] == []  # without a baseline there is nothing to compare with


def test_a_run_that_is_another_s_to_the_bit_is_told_and_counts_once(folder: Path) -> None:
    for number in range(4):
        save_run(folder, f"kl_cov@off-policy-s{number}", entropy=FALLING, right=0)  # as psr
        save_run(folder, f"nsr@off-policy-s{number}", entropy=[*FALLING[:-1], 0.23], right=0)
    plan = load_plan(PLAN)
    collect(plan, folder, folder)
    rows = {row.result.run.base: row for row in league(plan, load(plan, folder))["off-policy"]}
    same = {name: row.same_as for name, row in rows.items() if row.same_as}
    assert same == {"psr": "kl_cov"}  # the plan's order
    rise = rows["aer"].beyond_untrained
    assert rise is not None and rise.effect.mean == pytest.approx(0.0)  # pass@4 is 1 in both


OLDER, NEWER = {"commit": "a", "machine": "m"}, {"commit": "b", "machine": "m"}


@pytest.mark.parametrize(
    ("steps", "made", "told"),
    [
        ([3.0, 3.0, 3.0, 4.0], [OLDER] * 4, "1.62 ± 0.25"),
        ([3.0, 3.0, 3.0, 30.0], [OLDER] * 4, "1.50 ± 0.00"),  # other work beside one run
        ([3.0, 3.0, 9.0, 30.0], [OLDER] * 4, "-"),
        ([3.0, 3.0, 9.0, 9.0], [OLDER, OLDER, NEWER, NEWER], "1.50 ± 0.00"),  # of the seeds that one commit made
        ([3.0, 9.0, 9.0, 9.0], [OLDER, NEWER, NEWER, NEWER], "-"),  # one seed says little
    ],
)
def test_a_time_is_told_of_seeds_made_alike(steps: list[float], made: list[dict[str, str]], told: str) -> None:
    usual = [2.0, 1.9, 20.0, 2.1, 2.0]  # one beside other work
    grpo = result("grpo", *(replace(seed(i, time__step_s=[each] * 3), made=OLDER) for i, each in enumerate(usual)))
    seeds = (
        replace(seed(i, time__step_s=[each] * 3), made=by) for i, (each, by) in enumerate(zip(steps, made, strict=True))
    )
    assert pace(result("aer", *seeds), grpo) == told and pace(grpo, None) == "-"


def test_a_tuned_run_is_compared_with_the_tuned_baseline(tmp_path: Path) -> None:
    """Three points of four more, as the tuned baseline has too: nothing is the method's."""
    plan = plan_with(tmp_path, {"grpo": 1, "aer": 1, "psr": 0})
    for name, right in {"grpo": 2, "aer": 2, "psr": 3, "grpo.tuned": 3, "aer.tuned": 3}.items():
        for number in range(2):
            own = {"aer/entropy": FALLING, "aer/target": FLAT} if name.startswith("aer") else {}
            save_run(tmp_path / "runs", f"{name}@off-policy-s{number}", entropy=FALLING, right=right, curves=own)
    collect(plan, tmp_path / "runs", tmp_path)
    found = league(plan, load(plan, tmp_path))["off-policy"]
    means = {(row.result.run.base, row.setting): row.avg and row.avg.effect.mean for row in found}
    tuned = {row.result.run.base: row.setting for row in found if row.result.run.setting == "tuned"}
    assert means == {
        ("grpo", "paper's"): None,
        ("aer", "paper's"): 0.0,
        ("psr", "paper's, tuned alike"): 0.125,
        ("psr", "tuned: its own values"): 0.0,  # once more, beside what tuning has found for the baseline
        ("grpo", tuned["grpo"]): 0.125,  # what tuning does to the baseline
        ("aer", tuned["aer"]): 0.0,
    }
    assert [row.result.run.base for row in found if row.repeats] == ["psr"]
    alike = plan_with(tmp_path, {"grpo": 0, "aer": 1})
    rows = {row.result.run.name: row for row in league(alike, load(alike, tmp_path))["off-policy"]}
    tuned = rows["aer.tuned@off-policy"].avg
    assert tuned is not None and tuned.effect.mean == 0.125 and "grpo.tuned@off-policy" not in rows


def test_a_difference_in_every_problem_and_seed_is_higher_or_lower() -> None:
    from tools.lab.league import compare, said
    from tools.lab.rules import avg_at_k

    problems = np.full(50, 8)
    base = result("b", *(seed(i, problems, 16) for i in range(4)))
    better = result("a", *(seed(i, problems + 2, 16) for i in range(3)))
    up, down = compare(better, base, avg_at_k), compare(base, better, avg_at_k)
    assert up is not None and down is not None and (up.verdict, down.verdict) == ("higher", "lower")
    assert len(up.effect.seeds) == 3 and said(up) == "higher +12.5 [+12.5, +12.5]"
    assert compare(result("c", seed(9)), base, avg_at_k) is None
    other = replace(better.seeds[0], data="other problems")
    assert compare(replace(better, seeds=(other,)), base, avg_at_k) is None


def test_the_page_says_what_is_there_and_what_is_missing(folder: Path) -> None:
    plan = plan_with(folder, {})
    save_run(folder, "grpo_unclipped@lag-4-s0", entropy=FLAT, right=1)
    collect(plan, folder, folder)
    html, markdown = write(plan, folder)
    text, lines = html.read_text(), markdown.read_text().splitlines()
    assert "| off-policy | 16 of 128 | grpo_token_mean, grpo_unclipped, dr_grpo, " in "\n".join(lines)
    assert "| lag-4 | 2 of 128 | grpo, grpo_again, " in "\n".join(lines) and "aer (1 of 4)" in "\n".join(lines)
    assert "| on-policy | 0 of 128 | everything |" in lines
    [aer] = [line for line in lines if line.startswith("| aer | paper's | 4 |")]
    cells = [cell.strip() for cell in aer.split("|")[1:-1]]
    # .4 where .32 is asked: 25 % off, never reached, never settled; grpo has .2
    assert cells[3] == "87.5 ± 0.0" and cells[10:14] == ["25.0 ± 0.0", "37.5 ± 0.0", "-", "-"]
    assert cells[-1] == "1.50 ± 0.00"
    assert any(line.startswith("| grpo (null control) | paper's | 4 |") for line in lines)
    assert any(
        line.startswith("| grpo_unclipped | see Settings | 1 |") for line in lines
    )  # GRPO too, with a name of its own
    # grpo, which tries nothing, has .18, .2 and .22 in the end where .28, .26 and .24 are asked
    assert "| entropic.linear | off-policy | 1 | 10.0 | 10.0 | 22.4 | - |" in "\n".join(lines)
    assert "The tuned runs of all methods are left out" in text
    assert "2 of 2 comparisons are not decided" in text and "Hochberg" in text and "no evidence" in text
    untrained, *_ = [line for line in lines if line.startswith("| the untrained model |")]
    values = [cell.strip() for cell in untrained.split("|")[1:-1]]
    assert values[3] == "62.5" and values[5] == "100.0" and values.count("-") == len(values) - 3 == len(cells) - 3
    assert "method.tau" not in text and "upper clip bound" in text
    assert text.count("<figure") == text.count("</figure>") >= 4 and "<circle" in text
    assert "Entropy over right answers" in text and "Positive and negative samples" in text


def test_parts_of_a_league_come_together(folder: Path, tmp_path: Path) -> None:
    plan, out, second = load_plan(PLAN).select(["aer@*"]), tmp_path / "out", tmp_path / "second"
    plan = replace(plan, steps=9)  # of the runs above
    collect(plan, folder, out)
    left = [job.name for job in left_to_do(plan, jobs(plan, second), out)]
    assert [name for name in left if "off-policy" in name] == []
    assert [name for name in left if "lag-4" in name] == [f"aer@lag-4-s{i}" for i in (1, 2, 3)]
    save_run(second, "aer@lag-4-s2", entropy=FLAT, aer__entropy=0.4, aer__target=0.32)
    collect(plan, second, out)
    assert [seed.number for seed in load(plan, out)["aer@lag-4"].seeds] == [0, 2]


def test_a_league_of_nothing_has_a_page(tmp_path: Path) -> None:
    html, markdown = write(load_plan(PLAN), tmp_path)
    assert "0 of 128" in markdown.read_text() and "everything" in html.read_text()
    assert markdown.read_text().count("No run of it is finished.") == 4

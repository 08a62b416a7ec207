"""The league's page: what differs and what does not, what is missing, and what it puts together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.methods.base import Controller
from tests.tools.lab.plans import FALLING, FLAT, PLAN, ROOT, plan_with
from tests.tools.lab.saved import save_run
from tests.tools.lab.test_claims import result, seed
from tools.lab.following import uncontrolled_error
from tools.lab.league import league
from tools.lab.league_page import settings, write
from tools.lab.page import pace
from tools.lab.plan import BASE, LabPlan, jobs, load_plan
from tools.lab.results import Result, Results, load
from tools.lab.store import collect, left_to_do


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


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


def drawn(plan: LabPlan, name: str, *, less: float, draw: int) -> Result:
    """Four seeds of a run that answers 40 problems in .5 - ``less`` of 16 tries, give or take 5 points a seed."""
    [run] = [run for run in plan.runs if run.name == name]
    rng = np.random.default_rng(draw)
    rates = 0.5 - less + 0.05 * rng.standard_normal(4)
    seeds = (seed(i, rng.binomial(16, rate, 40), 16, entropy__full=FLAT) for i, rate in enumerate(rates))
    return Result(run, run.base, None, 32, tuple(seeds))


def test_a_star_is_for_what_few_chances_would_make_and_never_for_the_null_control() -> None:
    """A null control far from the baseline would be a fault of the comparison, which the verdict tells."""
    plan = load_plan(PLAN)
    less = {"grpo": 0.0, "grpo_again": 0.35, "psr": 0.35, "qae": 0.03, "nsr": 0.0}
    names = [f"{name}@off-policy" for name in less]
    runs = {name: drawn(plan, name, less=less[name.partition("@")[0]], draw=i) for i, name in enumerate(names)}
    rows = {row.result.run.base: row for row in league(plan, Results(None, runs, "grpo"))["off-policy"]}
    found = {name: row.avg for name, row in rows.items() if row.avg is not None}
    assert {name: (each.verdict, each.survives) for name, each in found.items()} == {
        "psr": ("lower", True),
        "grpo_again": ("lower", False),
        "qae": ("not decided", False),
        "nsr": ("not decided", False),
    }
    assert 0.05 < min(found["qae"].p, found["nsr"].p) < 0.6


def test_every_seed_is_compared_with_the_untrained_model() -> None:
    plan = load_plan(PLAN)
    own = drawn(plan, "psr@off-policy", less=0.0, draw=0)
    results = Results(replace(own.seeds[0], c=np.full(40, 8)), {own.run.name: own}, "grpo")
    [row] = league(plan, results)["off-policy"]
    assert row.beyond_untrained is not None and len(row.beyond_untrained.effect.seeds) == 4


def test_another_entropy_than_the_steps_says_nothing_of_the_baseline() -> None:
    """SIREN holds that of the peaks: GRPO's own, beside the same target, is another quantity."""
    grpo = result("grpo", seed(0, entropy__full=FLAT))
    target = Controller(measured="m/entropy", target="m/target", output="m/k")
    for measured, told in ((FLAT, [0.25]), ([0.9] * 9, [])):
        own = seed(0, entropy__full=FLAT, m__entropy=measured, m__target=[0.32] * 9)
        assert uncontrolled_error(result("m", own, controller=target), grpo) == pytest.approx(told)


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
    # GRPO too, with a name of its own
    assert any(line.startswith("| grpo_unclipped | see Settings | 1 |") for line in lines)
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


def test_settings_have_each_key_once_as_it_counts() -> None:
    """A step's run is made like the linear one, with another target."""
    found = {row[0]: row[2] for row in settings(load_plan(PLAN))}
    assert found["aec.step"] == (
        'method.target={kind="step", start=0.3, end=0.2, steps=30} method.delta=0.01 method.c_max=0.3'
    )


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

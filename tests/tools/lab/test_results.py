"""From the folders of finished runs to results in JSON, the table and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from tests.tools.lab.saved import STEPS, save_run
from tools.lab import page
from tools.lab.page import cell, method_rows, table_metrics, write
from tools.lab.plan import BASE, LabPlan, jobs, load_plan
from tools.lab.results import load, seconds, where_entropy_is
from tools.lab.store import collect, left_to_do
from tools.tiny.tabular import SETTINGS

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


FALLING = [0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.18, 0.2, 0.22]
FLAT = [0.4] * STEPS


@pytest.fixture
def plan() -> LabPlan:
    return replace(load_plan(Path("recipes/lab/lab.toml")), seeds=3)


@pytest.fixture
def folder(plan: LabPlan, tmp_path: Path) -> Path:
    for seed in range(3):
        save_run(tmp_path, f"grpo-s{seed}", entropy=FALLING)
        save_run(
            tmp_path,
            f"aer-s{seed}",
            entropy=FLAT,
            aer__entropy=0.4,
            aer__target=[0.36, 0.42, 0.6][seed],
            time__step_s=3.0,
        )
        save_run(tmp_path, f"siren-s{seed}", entropy=FALLING, right=3, siren__hbar=1.1, siren__anchor=1.0)
    save_run(tmp_path, "entropic-s0", entropy=[0.25] * STEPS, entropic__alpha=-1.0)
    save_run(tmp_path, BASE, entropy=FLAT, right=1)
    (tmp_path / "grpo-s0/provenance.json").write_text('{"commit": "abc", "machine": "a laptop"}')
    collect(plan, tmp_path, tmp_path)
    return tmp_path


def test_late_means_distances_and_ratios_of_seconds(plan: LabPlan, folder: Path) -> None:
    results = load(plan, folder)
    grpo, aer = results["grpo"], results["aer"]
    assert grpo.late("entropy/full") == pytest.approx([0.2] * 3) and grpo.first("entropy/full") == [0.4] * 3
    assert aer.distance == pytest.approx([0.4 / 0.36 - 1, 0.4 / 0.42 - 1, 0.4 / 0.6 - 1])
    assert results["siren"].distance == pytest.approx([0.1] * 3)  # of the peak entropy, not of the full one
    assert results["entropic"].saturated == [1.0] and grpo.saturated == [] == grpo.distance
    assert seconds(aer) == [3.0 / 32] * 3
    head, untrained, first, *_ = method_rows(results)
    row = dict(zip(head, first, strict=True))
    assert (row["run"], row["seeds"], row["entropy"], row["time"]) == ("grpo", "3", "0.200 ± 0.000", "1.00 ± 0.00")
    assert row["avg@4, %"] == "75.0 ± 0.0" and untrained[head.index("avg@4, %")] == "62.5"
    assert cell([0.1, 0.2], "+.1f", scale=100) == "+15.0 ± 7.1"
    assert cell([0.1], "+.1f", scale=100) == "+10.0" and cell([], ".1f") == "-"  # one seed has no spread
    assert table_metrics(["avg@8", "pass@2", "pass@8", "maj@8"]) == ["avg@8", "pass@8", "maj@8"]


def test_no_time_is_told_of_seeds_that_took_different_times(plan: LabPlan, folder: Path) -> None:
    for seed, seconds_of_step in enumerate((2.0, 3.0)):
        curves = {"time/step_s": [seconds_of_step] * STEPS}
        save_run(folder, f"entropy_bonus_large-s{seed}", entropy=FLAT, curves=curves)
    collect(plan, folder, folder)
    head, _, *rows = method_rows(load(plan, folder))
    times = {row[0]: row[head.index("time")] for row in rows}
    assert times["entropy_bonus_large"] == "-" and times["aer"] == "1.50 ± 0.00"


def test_alarms_that_lasted(plan: LabPlan, folder: Path) -> None:
    save_run(folder, "entropy_bonus_large-s0", entropy=FLAT, alarm__entropy_high=1.0, alarm__entropy_low=0.0)
    collect(plan, folder, folder)
    results = load(plan, folder)
    assert results["entropy_bonus_large"].alarms == ["entropy_high"] and results["grpo"].alarms == []


def test_results_are_small_files_that_stand_for_the_runs(plan: LabPlan, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "results/aer.json").read_text())
    assert content["controller"]["target"] == "aer/target" and len(content["seeds"]) == 3
    assert content["seeds"][2]["curves"]["aer/target"] == [0.6] * STEPS
    assert content["seeds"][0]["problems"] == {"n": [4, 4], "c": [2, 4], "length": [5.0, 5.0]}
    assert json.loads((folder / "results/grpo.json").read_text())["seeds"][0]["made"]["commit"] == "abc"
    with_runs = load(plan, folder)
    for path in folder.iterdir():
        if path.is_dir() and path.name != "results":
            path.rename(tmp_path / f"gone {path.name}")
    collect(plan, folder, folder)  # takes nothing away
    alone = load(plan, folder)
    assert method_rows(alone) == method_rows(with_runs) and set(alone.runs) == set(with_runs.runs)
    assert (alone["aer"].seeds[1].c == [2, 4]).all()


def test_a_lab_in_parts_does_only_what_its_results_do_not_have(plan: LabPlan, tmp_path: Path) -> None:
    plan = replace(plan, seeds=2, steps=STEPS).select(["grpo", "aer", "entropic_pi_off_below"])
    first, second, third, out = (tmp_path / name for name in ("first", "second", "third", "out"))
    for name in (BASE, "grpo-s0", "aer-s0"):
        save_run(first, name, entropy=FALLING)
    collect(plan, first, out)
    left = [job.name for job in left_to_do(plan, jobs(plan, second), out)]
    assert left == ["grpo-s0", "entropic_pi_off_below-s0", "grpo-s1", "aer-s1", "entropic_pi_off_below-s1"]  # from grpo
    save_run(second, "grpo-s1", entropy=FLAT)
    save_run(second, "aer-s1", entropy=FLAT[1:])
    collect(plan, second, out)
    assert [seed.number for seed in load(plan, out)["grpo"].seeds] == [0, 1]
    assert load(plan, out)["grpo"].curves("entropy/full") == [FALLING, FLAT]
    plan = plan.select(["grpo", "aer"])
    left = [job.name for job in left_to_do(plan, jobs(plan, third), out)]
    assert left == ["aer-s1"]  # of fewer steps than the plan's
    save_run(second, "grpo-s1", entropy=FALLING)
    collect(plan, second, out)
    assert load(plan, out)["grpo"].curves("entropy/full")[1] == FALLING  # made anew


def test_results_of_other_settings_are_refused(plan: LabPlan, folder: Path) -> None:
    runs = tuple(replace(run, set=(*run.set, "train.steps=7")) if run.name == "aer" else run for run in plan.runs)
    with pytest.raises(
        ConfigError, match=r"(?s)aer.json: results of other settings.*config.train.steps: was 60, now 7"
    ):
        load(replace(plan, runs=runs), folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, "config.train.steps: was 60, now 5"),
        ({"set": ("parallel.ranks_per_node=1", "parallel.tensor=1", "optimizer.lr=1.0")}, "config.optimizer.lr: was"),
        ({"evaluate": ("--data=recipes/tiny/data/eval.jsonl", "--samples=1")}, "evaluate: was"),
    ],
)
def test_a_lab_of_other_settings_takes_nothing_from_the_results_that_are_there(
    plan: LabPlan, folder: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out, other = tmp_path / "out", replace(plan, **change)
    collect(plan, folder, out)
    before = {path: path.read_bytes() for path in (out / "results").iterdir()}
    for act in (lambda: load(other, out), lambda: left_to_do(other, jobs(plan, folder), out)):
        with pytest.raises(ConfigError, match=f"results of other settings(?s:.*){re.escape(said)}"):
            act()
    with pytest.raises(ConfigError, match="results of other settings"):
        collect(other, folder, out)
    assert {path: path.read_bytes() for path in (out / "results").iterdir()} == before


def test_where_the_entropy_is(plan: LabPlan, folder: Path) -> None:
    results = load(plan, folder)
    unlikely, likely, certain = where_entropy_is(results["grpo"])
    assert unlikely == (pytest.approx(1 / 4), pytest.approx(0.9))  # exp(-1) = .37
    assert likely == (pytest.approx(1 / 4), pytest.approx(0.1))
    assert certain == (pytest.approx(2 / 4), 0.0)


def test_the_page_says_what_is_there_and_what_is_not(
    plan: LabPlan, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "SETTINGS", QUICK)
    html, markdown = write(plan, folder)
    text, table = html.read_text(), markdown.read_text()
    assert "4 of" in table and "| grpo | 3 |" in table and "not run" in table
    assert "commit abc" in table and "on a laptop" in table
    assert text.count("<figure") == text.count("</figure>") > 10
    for name in ("Controllers", "EntroPIC on an exact table", "Which tokens hold the entropy", "method.tau"):
        assert name in text
    collapse = next(line for line in table.splitlines() if "where AER's does not" in line)
    assert "| shows" in collapse and "+50.0 points [+50.0, +50.0]" in collapse and "| 3 |" in collapse
    assert "Null control" in text and "not evidence of no effect" in text and "<script>alert" not in text


def test_a_page_of_nothing(plan: LabPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SETTINGS", QUICK)
    html, _ = write(plan, tmp_path)
    assert "EntroPIC on an exact table" in html.read_text()


QUICK = {name: replace(setting, steps=10) for name, setting in SETTINGS.items()}  # long before anything converges

"""What the lab computes from finished runs: late means, distances, verdicts, the table and the page."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.metrics.writer import MetricsWriter
from tests.tools.runs import evaluation, sample
from tools.evaluate import save_evaluation
from tools.lab.claims import Claim, claims
from tools.lab.page import cell, method_rows, table_metrics, write
from tools.lab.plan import BASE, LABEL, LabPlan, load_plan
from tools.lab.results import Results, load, seconds, where_entropy_is
from tools.tiny.tabular import SETTINGS, Setting, simulate

ROOT = Path(__file__).parents[3]
STEPS = 9


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def save_run(folder: Path, name: str, *, entropy: list[float], right: int = 2, **metrics: float) -> None:
    """A finished run whose other metrics are the same in every step; ``aer__target`` is ``aer/target``."""
    with MetricsWriter(folder / name, trackers=[], total_steps=STEPS) as writer:
        for step, nats in enumerate(entropy, 1):
            shares = {"reward/mean": 0.3, "reward/outcome/correct": 0.3, "response/length": 9.0, "time/step_s": 2.0}
            own = {key.replace("__", "/"): value for key, value in metrics.items()}
            record = sample(entropy=[0.9, 0.1, 0.0, None], logprob=[-1.0, math.log(0.9), -0.001, None])
            writer.write(step, {"entropy/full": nats, **shares, **own}, [record])
    counts = evaluation([right, 4])
    counts["response"] = {"length": {"mean": 5.0}}
    save_evaluation(folder / name / "evaluation.json", LABEL, counts)


FALLING = [0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.18, 0.2, 0.22]
FLAT = [0.4] * STEPS


@pytest.fixture
def plan() -> LabPlan:
    return replace(load_plan(Path("recipes/lab/lab.toml")), seeds=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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
    return tmp_path


def verdicts(results: Results) -> dict[str, Claim]:
    return {claim.text: claim for claim in claims(results, {n: simulate(s) for n, s in QUICK.items()})}


QUICK = {name: Setting(steps=10) for name in SETTINGS}  # long before anything has converged


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


def test_verdicts_follow_the_runs(plan: LabPlan, folder: Path) -> None:
    found = verdicts(load(plan, folder))
    assert found["GRPO's entropy collapses"].verdict == "shows (3/3 seeds)"
    assert found["aer keeps the entropy at tau H_0"].verdict == "in some (2/3 seeds)"
    assert found["siren keeps its peak entropy at the anchor"].verdict == "shows (3/3 seeds)"
    assert found["siren ends with a higher pass@k than GRPO"].verdict == "does not show (0/3 seeds)"  # equal: both all
    assert found["PI control holds its target off-policy, from above"].verdict == "shows"  # one seed
    assert "bound in 100%" in found["PI control holds its target off-policy, from above"].measured
    assert found["PI control holds its target on-policy, from above"].verdict == "not run"
    assert found["PI removes it"].verdict == "does not show"  # after 10 steps
    for seed in range(3):
        save_run(folder, f"grpo-s{seed}", entropy=FLAT)
    assert verdicts(load(plan, folder))["GRPO's entropy collapses"].verdict == "does not show (0/3 seeds)"


def test_runs_are_compared_seed_by_seed(plan: LabPlan, folder: Path) -> None:
    for seed, nats in ((0, 0.1), (1, 0.5), (2, 0.1)):
        save_run(folder, f"nsr-s{seed}", entropy=[nats] * STEPS)
    for seed, nats in ((1, 0.4), (2, 0.2)):
        save_run(folder, f"psr-s{seed}", entropy=[nats] * STEPS)
    text = "negative samples keep more entropy than positive ones"
    assert verdicts(load(plan, folder))[text].verdict == "in some (1/2 seeds)"
    (folder / "psr-s1/evaluation.json").unlink()
    (folder / "psr-s2/evaluation.json").unlink()
    assert verdicts(load(plan, folder))[text].verdict == "not run"


@pytest.mark.parametrize(
    ("late", "alarm", "verdict"), [(0.9, 1.0, "shows"), (0.9, 0.0, "does not show"), (0.3, 1.0, "does not show")]
)
def test_an_explosion_needs_the_entropy_and_the_alarm(
    plan: LabPlan, folder: Path, late: float, alarm: float, verdict: str
) -> None:
    save_run(folder, "entropy_bonus_large-s0", entropy=[0.4, *[late] * (STEPS - 1)], alarm__entropy_high=alarm)
    results = load(plan, folder)
    assert results["entropy_bonus_large"].alarms == (["entropy_high"] if alarm else [])
    claim = verdicts(results)["a constant bonus that is large enough explodes, and the alarm says so"]
    assert claim.verdict == verdict


def test_where_the_entropy_is(plan: LabPlan, folder: Path) -> None:
    results = load(plan, folder)
    unlikely, likely, certain = where_entropy_is(results["grpo"], folder)
    assert unlikely == (pytest.approx(1 / 4), pytest.approx(0.9))  # exp(-1) = .37
    assert likely == (pytest.approx(1 / 4), pytest.approx(0.1))
    assert certain == (pytest.approx(2 / 4), 0.0)


def test_the_page_says_what_is_there_and_what_is_not(plan: LabPlan, folder: Path, tmp_path: Path) -> None:
    html, markdown = write(plan, folder, tmp_path / "out")
    text, table = html.read_text(), markdown.read_text()
    assert "4 of" in table and "| grpo | 3 |" in table and "not run" in table
    assert text.count("<figure") == text.count("</figure>") > 10
    for name in ("Controllers", "EntroPIC on an exact table", "Which tokens hold the entropy", "method.tau"):
        assert name in text
    assert "shows (3/3 seeds)" in text and "<script>alert" not in text


def test_a_page_of_nothing(plan: LabPlan, tmp_path: Path) -> None:
    html, _ = write(plan, tmp_path, tmp_path)
    assert "EntroPIC on an exact table" in html.read_text()

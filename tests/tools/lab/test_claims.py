"""Rules on data computed by hand, verdicts, and how often each rule finds a difference where there is none."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import RECIPES
from megatron_ext.methods.base import Controller
from tools.lab import claims as claims_module
from tools.lab.claims import NOT_DECIDED, NOT_RUN, NULL, OPPOSITE, SHOWS, claims, null_entries, p_value, verdict_of
from tools.lab.command import main as lab
from tools.lab.intervals import over_seeds
from tools.lab.plan import LabRun, load_plan
from tools.lab.results import Result, Results, Seed
from tools.lab.rules import (
    ENTROPY,
    MISMATCH,
    RATIO,
    RIGHT,
    RULES,
    STAGE,
    at_equal_reward,
    pooled_until_rising,
    rise,
    rises,
    switch_of,
)
from tools.tiny.tabular import SETTINGS, Setting, simulate

ROOT = Path(__file__).parents[3]
CLAIMS = Path("recipes/lab/claims.toml")
FALLING = [0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.18, 0.2, 0.22]  # late mean .2
QUICK = {name: Setting(steps=10) for name in SETTINGS}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def seed(number: int, c: Sequence[int] | np.ndarray = (2, 4), n: int = 4, **curves: list[float]) -> Seed:
    """``entropy__full`` is the curve entropy/full."""
    counts = np.array(c)
    right = float((counts / n).mean())
    passed = float((counts > 0).mean())
    return Seed(
        number=number,
        curves={key.replace("__", "/"): list(values) for key, values in curves.items()},
        metrics={"avg@16": right, "pass@16": passed, "pass@4": passed},
        ks=(2, n),
        length=5.0,
        n=np.full(len(counts), n),
        c=counts,
        lengths=np.full(len(counts), 5.0),
        data="s",
        made={},
    )


def result(name: str, *seeds: Seed, controller: Controller | None = None) -> Result:
    return Result(LabRun(name, Path()), name, controller, 32, tuple(seeds))


# --- rules, by hand ---


def test_late_and_kept_entropy_by_hand() -> None:
    a = result("a", seed(0, entropy__full=[0.4] * 9), seed(1, entropy__full=[0.5] * 9))
    b = result("b", seed(0, entropy__full=FALLING), seed(1, entropy__full=FALLING))
    assert RULES["late_entropy"].measure(a, b).seeds == pytest.approx((0.2, 0.3))
    assert RULES["kept_entropy"].measure(a, b).seeds == pytest.approx((1.0 - 0.5, 1.0 - 0.5))


def test_entropy_is_compared_where_both_answer_equally_well() -> None:
    """b learns twice as fast and its entropy falls with what it has learnt just as a's does: no difference."""
    assert pooled_until_rising([1, 3, 2, 2, 5], [9, 8, 6, 4, 1]) == ([1, 7 / 3, 5], [9, 6, 1])
    assert pooled_until_rising([1, 1, 2], [4, 2, 1]) == ([1, 2], [3, 1])  # equals too: they must rise

    slow = [0.01 * i for i in range(60)]
    fast = [0.02 * i for i in range(60)]

    def entropies(right: list[float]) -> list[float]:
        return [0.8 - 0.5 * share for share in right]

    difference, top = at_equal_reward(slow, entropies(slow), fast, entropies(fast))
    assert top == pytest.approx(0.495) and abs(difference) < 1e-9  # the mean of the slow one's last third
    late = [np.mean(entropies(right)[40:]) for right in (slow, fast)]
    assert late[0] - late[1] > 0.2  # the unconditioned rule would call it more entropy
    higher = [value + 0.1 for value in entropies(slow)]
    assert at_equal_reward(slow, higher, fast, entropies(fast))[0] == pytest.approx(0.1)
    # in the upper half alone: from .27 to .495 (the fast one begins at .04), where b has what it has less there
    kink = [0.8 - 0.5 * share + 10 * max(0.0, 0.2 - share) for share in fast]
    assert at_equal_reward(slow, entropies(slow), fast, kink)[0] == pytest.approx(0.0, abs=1e-9)
    # a run that never answers is compared at the start
    assert at_equal_reward([0.0] * 9, [0.9] * 9, [0.0] * 9, [0.4] * 9) == pytest.approx((0.5, 0.0))


def test_the_second_stage_is_a_difference_in_differences() -> None:
    stages, curve = [0.0] * 6 + [1.0] * 3, [0.4, 0.4, 0.4, 0.4, 0.3, 0.3, 0.36, 0.36, 0.36]
    sent = result("sent", seed(0, entropy__full=curve, data__stage=stages))
    control = result("control", seed(0, entropy__full=[0.4] * 4 + [0.3] * 2 + [0.34] * 3))
    assert switch_of(sent) == 6 and switch_of(control) == 4  # without stages: half of the steps
    assert rise(curve, 6) == pytest.approx(0.06)
    assert RULES["second_stage"].measure(sent, control).seeds == pytest.approx((0.02,))


def test_distances_from_a_target() -> None:
    controller = Controller(measured="h", target="goal")
    a = result("a", seed(0, h=[1.1] * 9, goal=[1.0] * 9, response__length=[8.0] * 9), controller=controller)
    b = result("b", seed(0, h=[0.7] * 9, goal=[1.0] * 9, response__length=[8.0] * 9), controller=controller)
    assert RULES["holds_target"].measure(a).seeds == pytest.approx((0.1,))
    assert RULES["closer_to_target"].measure(a, b).seeds == pytest.approx((0.2,))
    assert RULES["closer_to_target"].shown(a, b).startswith("a +10.0% from it, 8 tokens")


def test_held_out_answers_are_paired_by_problem() -> None:
    a, b = result("a", seed(0, c=[4, 2, 0])), result("b", seed(0, c=[2, 2, 1]))
    assert RULES["avg_at_k"].measure(a, b).seeds == pytest.approx(((0.5 + 0 - 0.25) / 3,))
    # pass@2 of 4: 1, 1 - 1/6, 0 less 1 - 1/6, 1 - 1/6, 1/2
    assert RULES["pass_at_k"].measure(a, b, k=2).seeds == pytest.approx(((1 / 6 + 0 - 1 / 2) / 3,))
    other = Seed(**{**vars(seed(0)), "data": "others"})
    with pytest.raises(ValueError, match="other problems"):
        RULES["avg_at_k"].measure(a, result("c", other))


def test_an_explosion_needs_the_alarm() -> None:
    curve = [0.4] + [0.9] * 8
    assert rises(result("a", seed(0, entropy__full=curve, alarm__entropy_high=[1.0] * 9)), "entropy_high").mean == 0.5
    assert rises(result("a", seed(0, entropy__full=curve)), "entropy_high").mean == 0.0


# --- verdicts ---


@pytest.mark.parametrize(
    ("values", "margin", "within", "verdict"),
    [
        ([0.10, 0.11, 0.12, 0.11], 0.05, False, SHOWS),
        ([0.10, 0.11, 0.12, 0.11], 0.10, False, NOT_DECIDED),  # beyond 0, not beyond the margin
        ([-0.10, -0.11, -0.12, -0.11], 0.05, False, OPPOSITE),
        ([0.10, -0.11, 0.12, -0.11], 0.0, False, NOT_DECIDED),
        ([0.10, 0.11, 0.12, 0.11], 0.2, True, SHOWS),
        ([0.10, 0.11, 0.12, 0.11], 0.05, True, OPPOSITE),
        ([0.10, 0.11, 0.12, 0.11], 0.11, True, NOT_DECIDED),
        ([0.10], 0.0, False, NOT_DECIDED),  # one seed
        ([0.10], 0.2, True, NOT_DECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval(values: list[float], margin: float, within: bool, verdict: str) -> None:
    effect = over_seeds(values)
    assert verdict_of(effect, margin, within=within) == verdict
    assert (p_value(effect, margin, within=within) < 0.05) == (verdict != NOT_DECIDED)


# --- the list ---


def test_every_claim_names_runs_of_its_plan_and_settings_of_the_table() -> None:
    used = {"table_error"}
    for plan in (load_plan(Path(f"recipes/lab/{name}.toml")) for name in ("lab", "replay")):
        runs = {run.name for run in plan.runs} | {"untrained"}
        content = tomllib.loads(plan.claims.read_text())
        for claim in content["claim"]:
            assert set(claim.get("runs", ())) <= runs and set(claim.get("settings", ())) <= SETTINGS.keys(), claim
        assert set(content["null"]) <= runs
        used |= {claim["rule"] for claim in content["claim"]}
        asked = {(entry["rule"], entry["margin"]) for entry in null_entries(content["claim"], content["null"])}
        compared = [c for c in content["claim"] if c["rule"] in RULES and RULES[c["rule"]].null]
        assert asked == {(c["rule"], c["margin"]) for c in compared}
    assert used == RULES.keys() | {"table_error"}


def test_engine_and_trainer_are_compared_by_how_far_their_late_ratio_is_from_one() -> None:
    replayed = [seed(i, [1], 16, mismatch__ratio=[0.9, 1.0, 1.0], mismatch__mean=[1, 1, 0.001]) for i in range(4)]
    off = [seed(i, [1], 16, mismatch__ratio=[1.0, 1.0, 0.99 - i / 1e3], mismatch__mean=[0, 0, 0.011]) for i in range(4)]
    pair = result("top_p", *replayed), result("top_p_off", *off)
    effect = RULES["ratio_error"].measure(*pair)
    assert effect.mean == pytest.approx(0.0115) and verdict_of(effect, 0.001) == SHOWS
    assert verdict_of(RULES["ratio_error"].measure(*pair[::-1]), 0.001) == OPPOSITE
    assert RULES["mismatch"].measure(*pair).mean == pytest.approx(0.01)
    assert RULES["mismatch"].shown(*pair) == "0.001000 against 0.011000"


def test_claims_are_decided_by_the_seeds_that_all_runs_have() -> None:
    aer = Controller(measured=ENTROPY, target=0.4)
    right, length = [0.3] * 9, [8.0] * 9
    held = [
        seed(
            i,
            [16, 16],
            16,
            entropy__full=[0.4 + 0.001 * i] * 9,
            reward__outcome__correct=right,
            response__length=length,
        )
        for i in range(4)
    ]
    grpo = [seed(i, [8, 9], 16, entropy__full=FALLING, reward__outcome__correct=right) for i in range(3)]
    runs = {"aer": result("aer", *held, controller=aer), "grpo": result("grpo", *grpo)}
    found = {claim.text: claim for claim in claims(Results(seed(0, [1, 4], 16), runs, "grpo"), tables(), CLAIMS)}
    collapse = found["GRPO's entropy collapses where AER's does not"]
    assert (collapse.verdict, collapse.num_seeds, collapse.survives) == (SHOWS, 3, True)
    assert collapse.measured == "100.0% of the first step's entropy against 50.0%"
    assert found["AER keeps the entropy at tau H_0"].verdict == SHOWS
    assert found["SIREN keeps its peak entropy at the anchor"].verdict == NOT_RUN
    assert found["off-policy without the ratio, PI removes it"].verdict == OPPOSITE  # 10 steps
    answers = found["AER ends with a higher pass@16 than GRPO"]
    assert "untrained 100.0%" in answers.measured and answers.published.startswith("avg. pass@32 72.5")
    assert found["grpo_again and grpo differ by chance only"].paper == NULL


def test_the_untrained_model_stands_beside_runs_that_began_with_it() -> None:
    def measured(*overrides: str) -> str:
        runs = {name: result(name, *(seed(i, [8, 9], 16) for i in range(4))) for name in ("experts", "experts_off")}
        runs = {name: replace(run, run=replace(run.run, set=overrides)) for name, run in runs.items()}
        found = claims(Results(seed(0, [1, 4], 16), runs, "grpo"), {}, Path("recipes/lab/replay-claims.toml"))
        return next(claim.measured for claim in found if "answers" in claim.text and claim.paper == "experts")

    assert measured("train.steps=60").endswith("untrained 15.6%")
    assert "untrained" not in measured('model.path="recipes/tiny/moe"')


def test_a_faulty_list_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(claims_module, "find", lambda _: tmp_path / "claims.toml")
    for line in ('rule = "nobody"', 'rule = "late_entropy"\nmargin = 0.1', 'rule = "late_entropy"\ntypo = 1'):
        text = f'null = ["a", "b"]\n[[claim]]\npaper = "p"\ntext = "t"\nruns = ["a"]\n{line}\n'
        (tmp_path / "claims.toml").write_text(text)
        with pytest.raises(ConfigError, match="claim 't'"):
            claims(Results(None, {}, "a"), {}, CLAIMS)


def tables() -> dict:
    return {name: simulate(setting) for name, setting in QUICK.items()}


# --- a planted null ---


def drawn(rng: np.random.Generator, name: str, difficulty: np.ndarray, *, more: float = 0.0) -> Result:
    """A run of four seeds: a run's luck, and noise of steps and responses around it. ``more`` entropy and accuracy."""
    seeds = []
    for number in range(4):
        luck, steps = rng.normal(0, 0.02), np.arange(60)
        right = 0.12 + (0.3 + more + luck) * (1 - np.exp(-steps / 25)) + rng.normal(0, 0.03, 60)
        entropy = 0.45 - (0.27 - more + luck) * (1 - np.exp(-steps / 20)) + rng.normal(0, 0.01, 60)
        counts = rng.binomial(16, np.clip(difficulty + luck + more, 0, 1))
        curves = {ENTROPY: entropy, RIGHT: right, STAGE: steps // 30}
        curves |= {RATIO: 1 - 0.1 * rng.random(60), MISMATCH: 0.01 + abs(luck) + 0.001 * rng.random(60)}
        curves = {key.replace("/", "__"): curve for key, curve in curves.items()}
        seeds.append(seed(number, c=counts, n=16, **{key: list(map(float, curve)) for key, curve in curves.items()}))
    return result(name, *seeds, controller=Controller(measured=ENTROPY, target=0.25))


OPTIONS = {"pass_at_k": {"k": 8}}


@pytest.mark.parametrize(
    ("text", "said"), [(None, "No such file"), ("a = 1", "no null and no claim"), ("a =", "value")]
)
def test_a_plan_whose_claims_are_no_list_is_refused_before_its_runs(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "claims.toml"
    if text is not None:
        file.write_text(text)
    plan = (RECIPES / "lab" / "lab.toml").read_text()
    (tmp_path / "plan.toml").write_text(re.sub(r"(?m)^claims = .*$", f'claims = "{file}"', plan))
    assert lab(["--plan", str(tmp_path / "plan.toml"), "--dir", str(tmp_path / "runs"), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.num_runs == 2])
def test_a_rule_seldom_finds_a_difference_between_runs_of_one_method(name: str) -> None:
    """Without any margin: both wrong verdicts together at most 5 % (12 of 120 has a chance of 1 % at exactly 5 %)."""
    rng, wrong, draws = np.random.default_rng(2), 0, 120
    for _ in range(draws):
        difficulty = rng.beta(0.7, 1.2, 100)
        effect = RULES[name].measure(drawn(rng, "a", difficulty), drawn(rng, "b", difficulty), **OPTIONS.get(name, {}))
        wrong += verdict_of(effect, 0.0) != NOT_DECIDED
    assert wrong < 12, f"{wrong} of {draws}"


@pytest.mark.parametrize("gain", [0.25, 0.15, 0.1])
def test_a_run_that_learns_less_has_not_more_entropy_at_equal_accuracy(gain: float) -> None:
    """Entropy is one function of the share of right answers; the runs differ in how much they learn alone.

    The noise of a step is that of the lab's runs, .06; a run that learns .35 reaches .47.
    """
    rng, shows, draws = np.random.default_rng(4), 0, 60

    def learnt(name: str, gain: float) -> Result:
        seeds = []
        for number in range(4):
            true = 0.12 + (gain + rng.normal(0, 0.02)) * (1 - np.exp(-np.arange(60) / 20))
            right = true + rng.normal(0, 0.06, 60)
            entropy = 0.52 - 0.6 * true + rng.normal(0, 0.01, 60)
            seeds.append(seed(number, reward__outcome__correct=list(right), entropy__full=list(entropy)))
        return result(name, *seeds)

    for _ in range(draws):
        effect = RULES["entropy_at_equal_reward"].measure(learnt("slow", gain), learnt("grpo", 0.35))
        shows += verdict_of(effect, 0.01) == SHOWS
    assert shows <= 3, f"{shows} of {draws}"


@pytest.mark.parametrize("name", ["late_entropy", "entropy_at_equal_reward", "kept_entropy", "avg_at_k"])
def test_a_rule_finds_a_planted_difference(name: str) -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.beta(0.7, 1.2, 100)
    effect = RULES[name].measure(drawn(rng, "a", difficulty, more=0.12), drawn(rng, "b", difficulty))
    assert verdict_of(effect, 0.01) == SHOWS and not math.isinf(effect.error)
    effect = RULES[name].measure(drawn(rng, "b", difficulty), drawn(rng, "a", difficulty, more=0.12))
    assert verdict_of(effect, 0.01) == OPPOSITE

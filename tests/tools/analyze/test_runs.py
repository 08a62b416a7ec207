"""Analyses of a run's own record: tokens, first tokens, pivotal words, psi / A, entropy against accuracy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.tools.analyze.inputs import analyze, record, write_recorded
from tests.tools.runs import write_run


def test_tokens_above_a_quantile_are_counted(tmp_path: Path) -> None:
    words = [*["the"] * 6, " So", " So", "\n", "2"]
    run = write_recorded(tmp_path / "run", [({"entropy/full": 1.0}, [record(words, [0.1] * 6 + [2.0, 3.0, 2.5, 0.2])])])
    found = analyze(tmp_path / "out", "tokens", run, "--quantile", 0.7)["selections"]
    ((name, each),) = found.items()
    assert name.startswith("entropy > ") and each["tokens"] == 3 and each["of"] == 10
    assert [(row["token"], row["count"], row["entropy"]) for row in each["ranked"]] == [(" So", 2, 2.5), ("\n", 1, 2.5)]
    assert each["ranked"][0]["share"] == pytest.approx(2 / 3, rel=1e-5) and each["ranked"][0]["selected"] == 1.0
    low = analyze(tmp_path / "low", "tokens", run, "--quantile", 0.7, "--below", "--without-cloud")["selections"]
    assert next(iter(low.values()))["ranked"][0]["token"] == "the"


def test_first_tokens_of_a_run_are_those_it_sampled(tmp_path: Path) -> None:
    records = [record([first, "."], [0.5, 0.0]) for first in ("A", "A", "A", "B")]
    run = write_recorded(
        tmp_path / "run", [({"entropy/full": 1.0}, records), ({"entropy/full": 1.0}, [record(["C"], [0.0])])]
    )
    found = analyze(tmp_path / "out", "first-tokens", run, "--steps", "1-1")["models"]["run"]
    assert [(each["token"], each["probability"]) for each in found["top"]] == [("A", 0.75), ("B", 0.25)]
    assert found["entropy_of_the_mean"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-5)


def test_pivotal_words_and_reflective_sentences(tmp_path: Path) -> None:
    tokens = ["How", "ever", ",", " so", ".", " Let", " us", " check", ".", " ", "Then", " done"]
    entropy = [2.0, 0.1, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0, 0.3, 3.0, 0.3]
    records = [record(tokens, entropy, problem_id=f"p{number}") for number in range(6)]
    run = write_recorded(tmp_path / "run", [({"entropy/full": 1.0}, records)])
    found = analyze(tmp_path / "out", "pivotal", run)["models"]["run"]
    pivotal, reflective = found["pivotal"], found["reflective"]
    assert pivotal["count"] == 12 and pivotal["words"]["however"] == pivotal["words"]["then"] == 6
    assert pivotal["mean"] == pytest.approx(2.5) and pivotal["others"] == pytest.approx(0.5)
    assert pivotal["difference"]["mean"] == pytest.approx(2.0)
    assert reflective["count"] == 6 and reflective["words"]["check"] == 6
    assert reflective["mean"] == pytest.approx(1.0)
    assert reflective["others"] == pytest.approx(np.mean([2.4 / 5, 1.2]), rel=1e-5)


def test_psi_is_that_of_the_paper(tmp_path: Path) -> None:
    """One right response of four with rewards 1 and -1: A = 1.5 or -.5 over the standard deviation 1."""
    right = record(["a", "b"], [0.5, 5.0], reward=1.0, group_reward=-0.5)
    wrong = record(["c"], [0.2], reward=-1.0, group_reward=-0.5, outcome="wrong")
    none = record(["d"], [0.2], reward=-1.0, group_reward=-1.0, outcome="wrong")
    run = write_recorded(tmp_path / "run", [({"entropy/full": 1.0}, [right, wrong, none])])
    found = analyze(tmp_path / "out", "pivotal", run)["models"]["run"]["psi"]
    shares = [0.4 * 0.5 / 1.5, 0.5, 0.4 * 0.2 / 0.5]  # min(alpha H, |A| / kappa) / |A|; alpha .4, kappa 2
    assert found["steps"] == [1] and found["by_step"][0] == pytest.approx(np.mean(shares), rel=1e-4)
    assert found["at_the_bound"] == pytest.approx(1 / 3, rel=1e-4)


def test_entropy_against_accuracy_is_fitted(tmp_path: Path) -> None:
    values = [(h, 0.9 - 0.2 * math.exp(h)) for h in np.linspace(1.0, 0.2, 12)]
    run = write_recorded(tmp_path / "run", [({"entropy/full": h, "reward/outcome/correct": r}, []) for h, r in values])
    other = write_run(tmp_path / "other")
    found = analyze(tmp_path / "out", "entropy-accuracy", run, other, "--labels", "a", "b")["runs"]
    assert found["a"]["fit"] == pytest.approx({"a": 0.2, "b": 0.9, "r2": 1.0}, rel=1e-5)
    assert found["a"]["entropy"] == pytest.approx([h for h, _ in values], rel=1e-5)
    assert found["b"]["steps"] == [1, 2, 3, 4, 5, 6] and found["b"]["accuracy"][2] == pytest.approx(0.3)

"""Intervals over seeds: against tables, by hand, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from tools.lab import intervals
from tools.lab.intervals import (
    SPREADS,
    coverage,
    false_discovery,
    holm,
    over_seeds,
    over_seeds_and_problems,
    quantile,
    two_sided,
)


@pytest.mark.parametrize(("df", "table"), [(1, 12.7062), (3, 3.18245), (7, 2.36462), (30, 2.04227)])
def test_quantiles_are_those_of_a_table_of_student_s_t(df: int, table: float) -> None:
    assert quantile(df) == pytest.approx(table, abs=1e-4)
    assert two_sided(table, df) == pytest.approx(0.05, abs=1e-5)


def test_four_seeds_by_hand() -> None:
    effect = over_seeds([1.0, 2.0, 3.0, 4.0])  # standard deviation 1.29099, over the root of 4: .645497
    assert (effect.mean, effect.df) == (2.5, 3) and effect.error == pytest.approx(0.645497, abs=1e-6)
    assert effect.interval == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-4)
    assert effect.p_above(2.5 - 2.05426) == pytest.approx(0.05, abs=1e-4) and effect.p_above(2.6) == 1.0


def test_seeds_and_problems_by_hand() -> None:
    # seeds' means 1 and 4, variance 4.5, over 2: 2.25; problems' means 2, 1 and 4.5, variance 3.25, over 3: 1.08333
    effect = over_seeds_and_problems(np.array([[0.0, 0.0, 3.0], [4.0, 2.0, 6.0]]))
    assert effect.seeds == (1.0, 4.0) and effect.mean == 2.5 and effect.df == 1
    assert effect.error**2 == pytest.approx(2.25 + 3.25 / 3)


def test_one_seed_has_no_interval() -> None:
    for effect in (over_seeds([3.0]), over_seeds_and_problems(np.ones((1, 5)))):
        assert effect.interval == (-np.inf, np.inf) and effect.p_above(0.0) == 1.0
    with pytest.raises(ValueError, match="at least one seed"):
        over_seeds([])
    with pytest.raises(ValueError, match="two axes"):
        over_seeds_and_problems(np.ones((2, 0)))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_benjamini_and_hochberg_by_hand() -> None:
    assert false_discovery([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert false_discovery([0.6, 0.7]) == pytest.approx([0.7, 0.7]) and false_discovery([]) == []


@pytest.mark.parametrize(("seeds", "problems"), SPREADS)
def test_the_interval_covers_and_a_bootstrap_over_four_seeds_does_not(seeds: float, problems: float) -> None:
    held, bootstrapped = coverage(seeds, problems, 300, np.random.default_rng(1))
    assert held >= 0.95 > 0.86 > bootstrapped


def test_the_docstring_s_table_is_of_the_spreads() -> None:
    assert intervals.__doc__ is not None
    for line, (seeds, problems) in zip(intervals.table(1).splitlines()[1:], SPREADS, strict=True):
        own = line.split()[:2]
        assert own == [f"{seeds:.0%}", f"{problems:.0%}"] and " ".join(own) in " ".join(intervals.__doc__.split())

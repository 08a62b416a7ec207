"""The statistics of an evaluation against enumeration, hand-computed values and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_ext.metrics import eval_stats
from megatron_ext.metrics.eval_stats import (
    average,
    average_difference,
    avg_at_k,
    bootstrap,
    clusters,
    differences,
    majority,
    paired_bootstrap,
    pass_at_k,
)


def same(a: str, b: str) -> bool:
    return float(a) == float(b)


def test_pass_at_k_equals_the_enumeration_of_all_draws():
    for n in range(1, 8):
        for c in range(n + 1):
            correct = [position < c for position in range(n)]
            for k in range(1, n + 1):
                draws = list(itertools.combinations(correct, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_by_hand_and_at_its_ends():
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert pass_at_k(8, 5, 4) == 1.0  # only three are wrong
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(256, 1, 1) == 1 / 256
    assert pass_at_k(100_000, 1, 50_000) == 0.5  # the binomials have 30,000 digits


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int):
    with pytest.raises(ValueError, match="n = "):
        pass_at_k(n, c, k)


def test_avg_is_pass_at_1():
    assert avg_at_k(8, 3) == 0.375 == pass_at_k(8, 3, 1)


def test_clusters_use_the_first_seen_key_even_when_equivalence_is_not_transitive():
    near = lambda a, b: abs(float(a) - float(b)) <= 1  # noqa: E731
    # 2 is near 1 (key 1); 3 is near 2 but not near the key 1, so it opens a cluster; 2 stays with the first.
    assert clusters(["1", "2", "3", "2"], near) == [[0, 1, 3], [2]]


def test_majority_by_hand():
    assert majority(["7", "3", "3.0", "7", "3.00"], same) == 1  # the key, not a later member
    assert majority(["7", "3", "3.0", "7.0"], same) == 0  # a tie goes to the earliest
    assert majority([None, None, "5", None], same) == 2  # what cannot be read does not vote
    assert majority([None, None], same) is None
    assert majority([], same) is None


def test_identical_strings_are_not_asked_about():
    def refuse(a: str, b: str) -> bool:
        raise AssertionError((a, b))

    assert majority(["x", "x", "x"], refuse) == 0


def test_bootstrap_of_a_bernoulli_has_the_binomial_interval():
    values = np.zeros((100, 2))
    values[:30, 0] = 1
    values[:, 1] = 0.25
    share, constant = bootstrap(values)
    assert share.mean == 0.3
    # Binomial(100, .3): standard error .0458, quantiles .21 and .39 exactly.
    assert (share.low, share.high) == pytest.approx((0.21, 0.39), abs=0.011)
    assert (constant.low, constant.mean, constant.high) == (0.25, 0.25, 0.25)


def test_bootstrap_is_seeded_and_its_means_are_draws_with_replacement(monkeypatch: pytest.MonkeyPatch):
    values = np.arange(7.0)[:, None]
    spread = np.random.default_rng(0).normal(size=(50, 1))
    assert bootstrap(spread, seed=3) == bootstrap(spread, seed=3) != bootstrap(spread, seed=4)
    means = eval_stats._resampled_means(values, 0, 20_000)[:, 0]
    # The variance of the mean of 7 draws from 0..6 is (49 - 1) / 12 / 7.
    assert means.mean() == pytest.approx(3, abs=0.03)
    assert means.var() == pytest.approx(4 / 7, rel=0.05)
    assert np.abs(means * 7 - np.round(means * 7)).max() < 1e-9
    monkeypatch.setattr(eval_stats, "BLOCK", 7 * 64)
    assert (eval_stats._resampled_means(values, 0, 20_000)[:, 0] == means).all()  # blocks change nothing


def test_bootstrap_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="not finite"):
        bootstrap(np.array([[0.5], [np.nan]]))


def test_paired_difference_sees_what_unpaired_intervals_hide():
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 0.9, 200)
    after = before + generator.normal(0.05, 0.05, 200)
    (first, second) = bootstrap(np.stack([before, after], axis=1))
    assert first.high > second.low  # unpaired, the intervals overlap
    found = paired_bootstrap(list(before), list(after))
    assert found.significant and found.p_value < 0.001
    assert paired_bootstrap(list(after), list(before)).p_value < 0.001  # in either direction
    assert found.interval.mean == pytest.approx((after - before).mean())
    assert found.interval.low == pytest.approx(found.interval.mean - 1.96 * 0.05 / 200**0.5, abs=0.002)


def test_paired_difference_of_nothing_and_of_different_problems():
    equal = paired_bootstrap([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])
    assert not equal.significant and equal.p_value == 1.0
    flipped = paired_bootstrap([1, 0], [0, 1])
    assert not flipped.significant and flipped.interval.mean == 0
    with pytest.raises(ValueError, match="3 and 2 problems"):
        paired_bootstrap([0, 0, 0], [0, 0])


def evaluated(counts: list[int], n: int, ks: list[int], sha256: str = "s") -> dict:
    rows = [{"id": str(i), "n": n, "c": c, "majority": 2 * c > n} for i, c in enumerate(counts)]
    return {"data": {"path": "eval.jsonl", "sha256": sha256}, "decoding": {"ks": ks}, "problems": rows}


def test_differences_of_what_both_evaluations_report():
    a, b = evaluated([0, 1, 4, 2], 4, [1, 2]), evaluated([2, 3, 4, 2], 4, [2, 4])
    found = differences(a, b)
    assert list(found) == ["avg@4", "pass@2", "maj@4"]
    assert found["avg@4"].interval.mean == pytest.approx((11 - 7) / 16)
    assert found["pass@2"].interval.mean == pytest.approx((5 / 6 + (1 - 3 / 6)) / 4)  # from 0 and 3/6 to 5/6 and 1
    assert found["maj@4"].interval.mean == 0.25
    assert list(differences(a, evaluated([0, 1, 4, 2], 8, [1, 2]))) == ["pass@1", "pass@2"]


def test_differences_need_the_same_problems():
    a = evaluated([0, 1], 4, [1])
    with pytest.raises(ValueError, match="different data"):
        differences(a, evaluated([0, 1], 4, [1], "other"))


def test_differences_need_the_same_decoding():
    a, b = evaluated([0, 1], 4, [1]), evaluated([0, 1], 8, [1])
    a["decoding"] |= {"temperature": 0.6, "top_p": 1.0, "max_response_tokens": 1024, "samples": 4, "seed": 0}
    b["decoding"] |= {"temperature": 1.0, "top_p": 1.0, "max_response_tokens": 8192, "samples": 8, "seed": 1}
    listed = r"different decoding \(max_response_tokens 1024 and 8192, temperature 0.6 and 1\)"
    with pytest.raises(ValueError, match=listed):
        differences(a, b)
    b["decoding"] |= {"temperature": 0.6, "max_response_tokens": 1024}
    assert differences(a, b)  # other samples of another seed are of the same question
    with pytest.raises(ValueError, match=r"different problems \(2 and 3"):
        differences(a, evaluated([0, 1, 2], 4, [1]))


def _averages(sets: Sequence[Sequence[float]]) -> np.ndarray:
    """Resampled problem by problem, set by set."""
    generator = np.random.default_rng(7)
    values = [np.array(v) for v in sets]
    return np.mean([v[generator.integers(len(v), size=(20_000, len(v)))].mean(1) for v in values], axis=0)


def test_averages_over_sets_resample_within_each_set():
    generator = np.random.default_rng(0)
    a, b = ([generator.random(size).tolist() for size in (30, 5, 80)] for _ in range(2))
    found = average(a)
    assert found.mean == pytest.approx(np.mean([np.mean(v) for v in a]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(_averages(a), [0.025, 0.975])), abs=0.005)
    alone, twice = average([a[2]]), average([a[2], a[2]])  # the chance of two sets is not the same
    assert twice.high - twice.low == pytest.approx((alone.high - alone.low) / math.sqrt(2), rel=0.05)
    changes = [np.subtract(after, before).tolist() for before, after in zip(a, b, strict=True)]
    difference = average_difference(a, b)
    low, high = np.quantile(_averages(changes), [0.025, 0.975])
    assert difference.interval.mean == pytest.approx(np.mean([np.mean(v) for v in changes]))
    assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high), abs=0.01)
    with pytest.raises(ValueError, match="same problems"):
        average_difference(a, [b[0], b[1][:4], b[2]])


@pytest.mark.parametrize(("n", "c", "k"), [(256, 1, 256), (256, 3, 64), (1024, 5, 256), (4096, 2, 2048), (256, 200, 2)])
def test_pass_at_k_of_hundreds_of_responses(n: int, c: int, k: int):
    """Against the product 1 - prod_{i=n-c+1..n} (1 - k / i) of arXiv 2107.03374, in logarithms."""
    wrong = n - c
    expected = 1.0 if wrong < k else -math.expm1(sum(math.log1p(-k / i) for i in range(wrong + 1, n + 1)))
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)

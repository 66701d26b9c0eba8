"""Metrics against their definitions: by enumeration, by exact arithmetic, by SciPy."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.evaluation.metrics import (
    answer_spread,
    bootstrap,
    compare,
    distinct_ngrams,
    exact_match,
    mcnemar,
    pass_at_k,
)

samples = st.lists(st.booleans(), min_size=1, max_size=8)


@given(samples, st.data())
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    subsets = list(itertools.combinations(correct, k))
    assert pass_at_k([correct], k) == pytest.approx([sum(map(any, subsets)) / len(subsets)], abs=1e-15)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (6, 3), (5, 5)])
@pytest.mark.parametrize("p", [Fraction(0), Fraction(1, 3), Fraction(9, 10), Fraction(1)])
def test_pass_at_k_is_unbiased(n, k, p):
    """Its expectation over all outcomes of n samples is 1 - (1 - p)^k."""
    expected = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(float(pass_at_k([[1] * c + [0] * (n - c)], k)[0]))
        for c in range(n + 1)
    )
    assert float(expected) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-14)


def test_pass_at_k_of_many_samples():
    """Binomial coefficients would overflow."""
    correct = np.zeros((1, 2000), dtype=bool)
    correct[0, :3] = True
    exact = 1 - Fraction(math.comb(1997, 1000), math.comb(2000, 1000))
    assert pass_at_k(correct, 1000)[0] == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("k", [0, 4, -1, True, 1.0])
def test_pass_at_k_refuses_more_than_there_are(k):
    with pytest.raises(ArgumentError, match=r"1 <= k <= samples per item \(3\)"):
        pass_at_k(np.ones((2, 3), dtype=bool), k)


def test_grades_that_are_none():
    for wrong in ([], [[]], [[[1]]], 1):
        with pytest.raises(ArgumentError, match="shape"):
            exact_match(wrong)
    with pytest.raises(ArgumentError, match="right or wrong"):
        exact_match([0.5, 1])
    assert exact_match([1, 0]).tolist() == [1, 0]
    assert exact_match([[1, 0], [1, 1]]).tolist() == [0.5, 1]


def test_percentiles_are_those_of_all_resamples():
    """Of three items there are 27 resamples: quantiles far from a step are known exactly."""
    values = np.array([0.0, 1.0, 5.0])
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    found = bootstrap(values, method="percentile", level=0.5, resamples=40_000)
    assert found == pytest.approx((2.0, means[6], means[20]))  # 6/27 < 1/4 < 7/27, 20/27 < 3/4 < 21/27


def reference_bca(values, of, tails, stars):
    """By SciPy's own implementation, on the same resamples' distribution."""
    from scipy.stats import bootstrap as scipy_bootstrap

    return scipy_bootstrap(
        (values,), of, vectorized=True, axis=-1, n_resamples=stars, confidence_level=tails, method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip


@pytest.mark.parametrize("statistic", [None, lambda rows: rows.std(axis=-1)])
def test_bca_agrees_with_scipy(statistic):
    values = np.random.default_rng(0).exponential(size=40)
    of = (lambda v, axis: v.mean(axis=axis)) if statistic is None else (lambda v, axis: v.std(axis=axis))
    reference = reference_bca(values, of, 0.9, 20_000)
    found = bootstrap(values, statistic, level=0.9, resamples=20_000)
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.03 * width)
    assert found.high == pytest.approx(reference.high, abs=0.03 * width)
    plain = bootstrap(values, statistic, level=0.9, resamples=20_000, method="percentile")
    assert plain.high < found.high  # skewed to the right: the correction moves it there


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 data sets of 100 items, p = 0.7, level 0.8: below 140 or above 180 is 3 in 10,000 for coverage 0.8."""
    data = np.random.default_rng(5).random((200, 100)) < 0.7
    found = [bootstrap(row, level=0.8, resamples=600, seed=i) for i, row in enumerate(data)]
    assert 140 <= sum(i.low <= 0.7 <= i.high for i in found) <= 180


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.sampled_from(["percentile", "bca"]))
def test_intervals_are_ordered_and_repeatable(values, method):
    first = bootstrap(values, method=method, resamples=50)
    assert first == bootstrap(values, method=method, resamples=50)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= first.low <= first.high <= max(values) + slack


def test_seeds_differ_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(2).random(20)
    whole = bootstrap(values, resamples=300)
    assert whole != bootstrap(values, resamples=300, seed=1)
    monkeypatch.setattr("powermc.evaluation.metrics._CHUNK", 700)
    assert bootstrap(values, resamples=300) == pytest.approx(whole, abs=1e-12)


def test_rows_are_resampled_whole():
    """A ratio of two columns that are proportional has no spread, though each has."""
    rows = np.arange(1.0, 9.0)[:, None] * [2.0, 1.0]
    found = bootstrap(rows, lambda r: r[..., 0].sum(-1) / r[..., 1].sum(-1), resamples=200)
    assert found == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": [1.0]}, "two items or more"),
        ({"values": [1.0, math.nan]}, "finite"),
        ({"level": 1.0}, "level must be > 0 and < 1, got 1.0"),
        ({"method": "magic"}, "method must be one of percentile, bca, got 'magic'"),
        ({"resamples": 0}, "resamples must be >= 1"),
    ],
)
def test_bootstrap_refuses(settings, message):
    with pytest.raises(ArgumentError, match=message):
        bootstrap(**{"values": [0.0, 1.0], **settings})


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_exact_binomial(only_a, only_b):
    from scipy.stats import binomtest

    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_by_enumeration():
    """Of all 2^7 ways in which 7 coins fall, the share at least as uneven as 1 : 6."""
    ways = [sum(coins) for coins in itertools.product((0, 1), repeat=7)]
    assert mcnemar(1, 6) == pytest.approx(sum(min(w, 7 - w) <= 1 for w in ways) / len(ways))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=20))
def test_pairs_are_counted(pairs):
    a, b = np.array(pairs).T
    found = compare(a, b, resamples=50)
    counts = Counter(pairs)
    assert (found.only_a, found.only_b) == (counts[True, False], counts[False, True])
    assert (found.both, found.neither) == (counts[True, True], counts[False, False])
    assert found.difference.estimate == pytest.approx(a.mean() - b.mean())
    swapped = compare(b, a, resamples=50)
    assert swapped.p == found.p
    assert swapped.difference.estimate == -found.difference.estimate


def test_pairing_narrows_the_interval():
    hard = np.random.default_rng(3).random(200) < 0.5
    better = hard.copy()
    better[np.flatnonzero(~hard)[:10]] = True
    difference = compare(better, hard).difference
    assert difference.low > 0
    assert bootstrap(better).low < bootstrap(hard).high


def test_several_samples_have_no_mcnemar():
    found = compare(np.ones((3, 4), dtype=bool), np.zeros((3, 2), dtype=bool))
    assert found.difference == (1, 1, 1)
    assert found.p is None
    with pytest.raises(ArgumentError, match="same items, got 3 and 2"):
        compare([1, 1, 1], [1, 1])


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
def test_spread_by_its_definitions(answers):
    found = answer_spread(answers)
    shares = [answers.count(a) / len(answers) for a in set(answers)]
    assert found.entropy == pytest.approx(-sum(s * math.log(s) for s in shares), abs=1e-12)
    assert found.distinct == len(set(answers))
    pairs = list(itertools.combinations(answers, 2))
    if pairs:
        assert found.disagreement == pytest.approx(sum(x != y for x, y in pairs) / len(pairs))
    else:
        assert math.isnan(found.disagreement)


def test_spread_of_nothing():
    with pytest.raises(ArgumentError, match="no answers"):
        answer_spread([])
    assert str(answer_spread(["a"]).entropy) == "0.0"


def test_distinct_ngrams():
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct_ngrams([["a"], []], 1) == 1
    assert math.isnan(distinct_ngrams([[1]], 2))
    with pytest.raises(ArgumentError, match="n must be >= 1"):
        distinct_ngrams([[1]], 0)

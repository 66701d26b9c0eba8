"""The tests' own tests: p-values that are too small would cry wolf, ones that are too large would see nothing.

Validity (P(p <= a) <= a) is checked exactly, by summing over every outcome of small experiments, not by simulation.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from powermc.choices import Stream, UniformLevel
from powermc.kernels import Metropolis
from powermc.testing import (
    assert_streams,
    bounded_mean_p,
    chi_square_p,
    detectable_variation,
    enumerate_kernel,
    frequencies,
    multinomial_p,
    prove,
    sequential_test,
)
from powermc.testing import strategies as toys
from powermc.testing.statistics import _log_entropy_tail, pool
from powermc.types import State, evaluate

# The sequential test


def chance_to_fail(rounds, false_positives, uniform):
    """The largest chance to fail over laws of the p-values: exactly uniform ones, or any with P(q <= a) <= a."""
    beta = false_positives / rounds
    gamma = beta ** (1 / rounds)
    thresholds = [beta * gamma**-i for i in range(rounds)]
    value = 0.0
    for fail in reversed(thresholds):
        if uniform:
            value = fail + (min(1.0, gamma + fail) - fail) * value
        else:  # any mass f on [0, fail] and c on (fail, gamma + fail] with f <= fail, f + c <= gamma + fail
            value = max(f + (min(1.0, gamma + fail) - f) * value for f in np.linspace(0, fail, 101))
    return value


@pytest.mark.parametrize("rounds", [1, 2, 4, 7])
@pytest.mark.parametrize("rate", [1e-9, 1e-6, 0.05, 0.3])
def test_the_bound_holds_for_every_law_of_the_p_values(rounds, rate):
    """Dynamic programming over the rounds; equality for uniform p-values, so the test wastes nothing."""
    assert chance_to_fail(rounds, rate, uniform=False) <= rate * (1 + 1e-9)
    if 2 * (rate / rounds) ** (1 / rounds) <= 1:
        assert chance_to_fail(rounds, rate, uniform=True) == pytest.approx(rate)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_procedure_follows_the_derivation(rate):
    """Uniform p-values through the code: the share of failures is `rate`. A wrong threshold, a round too many or a
    missing division by gamma shifts it. False positives of this test: 1e-6 (binomial, 20,000 runs)."""
    rng = np.random.default_rng(0)
    failed = sum(not sequential_test(lambda n: rng.random(), n=1, false_positives=rate).passed for _ in range(20_000))
    low, high = stats.binom.ppf([5e-7, 1 - 5e-7], 20_000, rate)
    assert low <= failed <= high


def test_sample_sizes_and_thresholds_by_round():
    asked = []

    def undecided(n):
        asked.append(n)
        return 0.02

    verdict = sequential_test(undecided, n=10, false_positives=4e-4, rounds=4, growth=3)
    assert asked == [10, 30, 30, 30]
    assert [r.fail for r in verdict.rounds] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert [r.go_on - r.fail for r in verdict.rounds] == pytest.approx([0.1] * 4)
    assert not verdict.passed


def test_several_p_values_are_combined_by_bonferroni():
    """One of two p-values being 6e-7 is no failure at 1e-6; 4e-7 is."""
    assert sequential_test(lambda n: [0.5, 6e-7], n=1, false_positives=1e-6, rounds=1).passed
    assert not sequential_test(lambda n: [0.5, 4e-7], n=1, false_positives=1e-6, rounds=1).passed
    assert sequential_test(lambda n: [0.9, 0.5], n=1).rounds[0].q == 1.0
    assert sequential_test(lambda n: [0.5, 0.1, 0.2], n=1).rounds[0].q == pytest.approx(0.3)


def test_a_discrepancy_is_found_and_a_right_law_passes():
    rng = np.random.default_rng(1)
    law = np.array([0.2, 0.3, 0.5])

    def against(true):
        return sequential_test(lambda n: chi_square_p(rng.multinomial(n, true), law), n=5000).passed

    assert against(law)
    assert not against(np.array([0.25, 0.3, 0.45]))


# p-values


def assert_valid(p_values, probabilities):
    """P(p <= a) <= a at every attained a."""
    order = np.argsort(p_values)
    reached = np.cumsum(np.asarray(probabilities)[order])
    sorted_p = np.asarray(p_values)[order]
    last_of_ties = np.append(np.diff(sorted_p) > 1e-12, True)
    assert (reached[last_of_ties] <= sorted_p[last_of_ties] + 1e-9).all()


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("law", [(0.5, 0.5), (0.9, 0.1), (0.999, 0.001), (0.5, 0.3, 0.2), (0.98, 0.01, 0.01)])
def test_multinomial_p_is_valid_for_every_n(n, law):
    """All outcomes of n draws summed up, rare cells included, where the chi-square law is far off."""
    outcomes = [(*c, n - sum(c)) for c in product(range(n + 1), repeat=len(law) - 1) if sum(c) <= n]
    p = [multinomial_p(np.array(c), np.array(law), least_expected=0.0) for c in outcomes]
    assert_valid(p, stats.multinomial(n, law).pmf(outcomes))


def test_multinomial_p_is_above_its_limit_for_many_cells():
    """As n grows 2 n KL becomes chi-square with d degrees of freedom: no bound may lie below its tail. With many cells
    a missing factor shows that two or three forgive. Nor is it loose: at p = 1e-6 t is at most doubled."""
    for d in (1, 2, 5, 20, 100, 400):
        t = np.linspace(d, 4 * d + 60, 200)
        bound = np.array([_log_entropy_tail(v, d) for v in t])
        assert (bound >= stats.chi2.logsf(2 * t, d) - 1e-9).all()
        needed = stats.chi2.isf(1e-6, d) / 2
        assert t[bound <= np.log(1e-6)][0] <= 2 * needed


def test_the_chi_square_law_is_not_valid_there():
    """Why `multinomial_p` exists: at 7 draws and a rare cell, p <= 1e-9 happens with probability 2e-5."""
    outcomes = [np.array([7 - k, k]) for k in range(8)]
    p = [chi_square_p(counts, np.array([0.999, 0.001]), least_expected=0.0) for counts in outcomes]
    with pytest.raises(AssertionError):
        assert_valid(p, stats.binom(7, 0.001).pmf(range(8)))


@pytest.mark.parametrize("n", [1, 10, 60])
@pytest.mark.parametrize("mean", [0.5, 0.03, 0.999])
def test_bounded_mean_p_is_valid_for_every_n(n, mean):
    """Coin tosses, and values that are never an end of the interval."""
    for low, high in [(0.0, 1.0), (mean / 2, mean + (1 - mean) / 2)]:
        chance = (mean - low) / (high - low)
        p = [bounded_mean_p(np.array([high] * k + [low] * (n - k)), mean) for k in range(n + 1)]
        assert_valid(p, stats.binom(n, chance).pmf(range(n + 1)))


def test_bounded_mean_p_at_the_ends():
    assert bounded_mean_p(np.zeros(5), 0.0) == 1.0
    assert bounded_mean_p(np.array([0.0, 0.1]), 0.0) == 0.0
    with pytest.raises(AssertionError, match=r"lie in \[0, 1\]"):
        bounded_mean_p(np.array([1.2]), 0.5)


def test_bounded_mean_p_finds_what_its_docstring_says():
    """1,000 averages of 100 coin tosses, off by the stated distance: found in 99 of 100 repetitions or more."""
    rng = np.random.default_rng(2)
    level, n, tosses = 1e-6, 1000, 100
    distance = math.sqrt(2 * math.log(20 / level) * 0.25 / tosses / n)
    off = 0.5 + 1.5 * distance
    p = [bounded_mean_p(rng.binomial(tosses, off, n) / tosses, 0.5) for _ in range(100)]
    assert sum(v <= level for v in p) >= 99
    assert all(bounded_mean_p(rng.binomial(tosses, 0.5, n) / tosses, 0.5) > level for _ in range(100))


@given(st.lists(st.integers(20, 60), min_size=2, max_size=5))
def test_chi_square_p_is_scipys_where_nothing_is_pooled(counts):
    law = np.full(len(counts), 1 / len(counts))
    assert chi_square_p(np.array(counts), law) == pytest.approx(stats.chisquare(counts).pvalue)


@pytest.mark.parametrize("p_value", [chi_square_p, multinomial_p])
def test_one_count_where_none_can_be_fails(p_value):
    law = np.array([0.5, 0.5, 0.0])
    assert p_value(np.array([500, 499, 1]), law) == 0.0
    assert p_value(np.array([500, 500, 0]), law) > 0.9


@given(toys.weights(6), st.floats(0.0, 0.6))
def test_pools_reach_the_least_probability_and_keep_all_of_it(law, least):
    cell = pool(law, least)
    mass = np.bincount(cell, law)
    assert mass[0] == 0
    assert (law[cell == 0] == 0).all()
    assert (law[cell > 0] > 0).all()
    assert len(mass) == 2 or (mass[1:] >= least - 1e-12).all()
    assert mass.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "cells"), [(1000, 4), (5000, 40)])
def test_detectable_variation_is_detected(n, cells):
    """Draws from a law at exactly that distance: found at least 97 times of 100 (99% is stated; false alarms 1e-2
    would take 3 misses). And not vacuous: below 1, shrinking like 1 / sqrt(n)."""
    law = np.full(cells, 1 / cells)
    delta = detectable_variation(n, cells, 1e-6)
    other = law + np.where(np.arange(cells) < cells // 2, 1, -1) * 2 * delta / cells
    assert np.abs(other - law).sum() / 2 == pytest.approx(delta)
    assert (other >= 0).all()
    rng = np.random.default_rng(3)
    assert sum(multinomial_p(rng.multinomial(n, other), law) <= 1e-6 for _ in range(100)) >= 97
    assert detectable_variation(4 * n, cells, 1e-6) == pytest.approx(delta / 2, rel=1e-6)
    assert detectable_variation(5000, 40, 1e-6 / 12) < 0.2


# Streams against the enumerated law


def test_production_streams_realise_the_enumerated_law(peaked):
    """Mixture of two temperatures and entropy cuts, 4 steps. False positives 1e-6."""
    from powermc.kernels import Mixture
    from powermc.sequences import Entropy

    kernel = Mixture([peaked.metropolis(2.0, temperature=0.5), peaked.metropolis(2.0, Entropy(), 1.0)], [0.5, 0.5])
    report = assert_streams(kernel, peaked.paths, n=2500)
    assert report.verdict.passed
    assert 0 < report.detectable < 0.3
    assert report.cells > 10


class Generous(Metropolis):
    """Accepts with min(1, 1.5 r)."""

    def step(self, choices, state):
        move = yield from self.proposal.propose(choices.at("proposal"), state.value)
        if move.null:
            return State(move.origin, state.log_density), {}
        value, log_density = yield from evaluate(self.target, move.value)
        log_ratio = log_density - state.log_density + move.log_hastings
        if choices.at("accept").level().below(log_ratio + math.log(1.5)):
            return State(value, log_density), {}
        return State(move.origin, state.log_density), {}


def test_a_slightly_wrong_accept_rule_is_caught(peaked):
    """Accepting with min(1, 1.5 r) moves 4.5% of the pair law, and the frequencies of values too: found."""
    right = peaked.metropolis(2.0, temperature=1.0)
    law = enumerate_kernel(right, peaked.paths)
    wrong = Generous(right.target, right.proposal)
    variation = np.abs(law.pi[:, None] * (enumerate_kernel(wrong, peaked.paths).matrix - law.matrix)).sum() / 2
    assert 0.04 < variation < 0.05
    with pytest.raises(AssertionError, match="the streams do not realise the enumerated law"):
        assert_streams(wrong, peaked.paths, law=law, n=5_000, steps=2)


class Skewed(Stream):
    """Levels are u^1.3: too many acceptances."""

    __slots__ = ()

    def step(self, step):
        return Skewed._of(super().step(step))

    def at(self, purpose, index=0):
        return Skewed._of(super().at(purpose, index))

    @staticmethod
    def _of(stream):
        child = Skewed.__new__(Skewed)
        for name in Stream.__slots__:
            setattr(child, name, getattr(stream, name))
        return child

    def level(self):
        return UniformLevel(self.uniform() ** 1.3)


class Repeating(Stream):
    """Every step gets the numbers of the first."""

    __slots__ = ()

    def step(self, step):
        return super().step(0)


class OneSeries(Stream):
    """Every chain gets the numbers of chain 0."""

    __slots__ = ()

    def __init__(self, seed, *, chain):
        super().__init__(seed)


@pytest.mark.parametrize("streams", [Skewed, Repeating, OneSeries])
def test_faulty_streams_are_caught(streams, peaked):
    with pytest.raises(AssertionError, match="the streams do not realise the enumerated law"):
        assert_streams(peaked.metropolis(2.0, temperature=1.0), peaked.paths, streams=streams, n=3000)


class ReadsTheLevel(Metropolis):
    """Compares log_u by hand: NaN under enumeration, a number in production."""

    def step(self, choices, state):
        move = yield from self.proposal.propose(choices.at("proposal"), state.value)
        value, log_density = yield from evaluate(self.target, move.value)
        if choices.at("accept").level().log_u < log_density - state.log_density:
            return State(value, log_density), {}
        return state, {}


def test_a_kernel_that_is_another_in_production_is_caught(peaked):
    kernel = ReadsTheLevel(peaked.metropolis(2.0).target, peaked.suffix())
    prove(kernel, peaked.paths, irreducible=False)
    with pytest.raises(AssertionError, match="the streams do not realise"):
        assert_streams(kernel, peaked.paths, n=500)


def test_a_step_out_of_the_space_is_named(peaked):
    kernel = peaked.metropolis(2.0)
    with pytest.raises(AssertionError, match="not in the supported space"):
        assert_streams(kernel, peaked.paths, law=enumerate_kernel(Keep(kernel.target), peaked.paths[:3]), n=100)


class Keep:
    """Stays where it is."""

    fields: dict = {}  # noqa: RUF012

    def __init__(self, target):
        self.target = target

    def init(self, value):
        value, log_density = yield from evaluate(self.target, value)
        return State(value, log_density)

    def step(self, choices, state):
        return state, {}
        yield


def test_frequencies():
    assert list(frequencies(["a", "b", "a"], ["b", "a", "c"])) == [1, 2, 0]
    with pytest.raises(KeyError):
        frequencies(["z"], ["a"])

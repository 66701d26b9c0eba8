"""Targets against their formulas, and their care for -inf. `prove` takes a target's own word; these tests do not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.scheduling import run
from powermc.sequences import SequenceProbability
from powermc.targets import Power, Product, Table, Tempered, Tilted
from powermc.testing import strategies as toys
from powermc.toy import TabularModel
from powermc.types import evaluate

VALUES = range(4)
INF = math.inf


@given(toys.tables(VALUES), st.sampled_from([0.5, 1.0, 4.0]))
def test_power_multiplies_and_keeps_the_support(table, alpha):
    for v in VALUES:
        assert Power(table, alpha).log_density(v) == alpha * table.log_density(v)


@given(toys.tables(VALUES))
def test_power_zero_is_uniform_on_the_support_only(table):
    """0 * -inf would be NaN; taken as 0 it would put mass on impossible values."""
    for v in VALUES:
        assert Power(table, 0.0).log_density(v) == (0.0 if table.log_density(v) > -INF else -INF)


@given(toys.tables(VALUES), toys.tables(VALUES))
def test_product_adds_and_intersects_supports(a, b):
    for v in VALUES:
        assert Product((a, b)).log_density(v) == a.log_density(v) + b.log_density(v)


@given(toys.tables(VALUES), toys.tables(VALUES), st.sampled_from([0.0, 0.25, 1.0]))
def test_tempered_bridges_on_the_intersection_of_supports(a, b, beta):
    """At the ends a naive formula has 0 * -inf, or the wider support."""
    for v in VALUES:
        x, y = a.log_density(v), b.log_density(v)
        expected = (1 - beta) * x + beta * y if x > -INF and y > -INF else -INF
        assert Tempered(a, b, beta).log_density(v) == expected


def test_tilted_adds_the_reward_where_the_base_has_support():
    asked = []

    def reward(v):
        asked.append(v)
        return {0: 2.5, 1: -INF}[v]

    tilted = Tilted(Table({0: -1.0, 1: -1.0, 2: -INF}), reward)
    assert [tilted.log_density(v) for v in range(4)] == [1.5, -INF, -INF, -INF]
    assert asked == [0, 1]


@pytest.mark.parametrize("reward", [math.nan, INF])
def test_tilted_refuses_a_reward_that_is_no_number(reward):
    with pytest.raises(ArgumentError, match="reward must be a number or -inf"):
        Tilted(Table({0: 0.0}), lambda v: reward).log_density(0)


def test_table_gives_values_it_does_not_list_probability_zero():
    assert Table({0: 1.0}).log_density(7) == -INF


@pytest.mark.parametrize("alpha", [-0.1, math.nan, INF])
def test_power_refuses_alpha_out_of_range(alpha):
    with pytest.raises(ArgumentError, match="alpha must be a finite number >= 0"):
        Power(Table({0: 0.0}), alpha)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_tempered_refuses_beta_out_of_range(beta):
    with pytest.raises(ArgumentError, match=r"beta must lie in \[0, 1\]"):
        Tempered(Table({}), Table({}), beta)


def test_product_refuses_no_factors():
    with pytest.raises(ArgumentError, match="at least one factor"):
        Product(())


def test_a_product_of_two_models(peaked):
    """A path scored by the first model is scored by the second too: p_1 p_2, not p_1^2."""
    other = replace(peaked, model=TabularModel.random(0, vocab_size=3, order=1))
    target = Product(tuple(SequenceProbability(toy.model) for toy in (peaked, other)))
    for x, p, q in zip(peaked.paths, peaked.p, other.p, strict=True):
        if p > 0:
            assert run(evaluate(target, x))[1] == pytest.approx(math.log(p * q))


def test_evaluate_completes_a_path_for_every_factor(peaked):
    """A target that forgets to pass on `missing` would take the density of a path that was never scored."""
    p = SequenceProbability(peaked.model)
    plain = Table(dict.fromkeys(peaked.paths, -0.5))
    x = peaked.paths[0]
    for target, expected in [
        (Power(p, 2.0), lambda lp: 2 * lp),
        (Product((plain, p)), lambda lp: lp - 0.5),
        (Tempered(plain, p, 0.5), lambda lp: 0.5 * lp - 0.25),
        (Tempered(p, plain, 0.5), lambda lp: 0.5 * lp - 0.25),
        (Tilted(p, lambda v: float(len(v))), lambda lp: lp + len(x)),
    ]:
        value, log_density = run(evaluate(target, x))
        assert value.log_p is not None
        assert log_density == pytest.approx(expected(value.log_prob), abs=1e-12)
        assert target.missing(value) is None

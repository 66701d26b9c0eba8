"""Inverse-CDF draws and the rules of `Stream`; its statistics are in test_streams.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.choices import Stream, UniformLevel, inverse_cdf
from powermc.errors import ArgumentError
from powermc.testing import strategies as toys

unit = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.integers(1, 6).flatmap(lambda n: toys.weights(n)), unit)
def test_inverse_cdf_returns_the_interval_that_holds_u(weights, u):
    """Would catch an off-by-one, `side="left"` at a boundary, and a draw of weight zero."""
    with np.errstate(divide="ignore"):
        i = inverse_cdf(np.log(weights) - 400.0, u)
    below, upto = weights[:i].sum(), weights[: i + 1].sum()
    assert weights[i] > 0
    assert below <= u + 1e-12
    assert u <= upto + 1e-12


@pytest.mark.parametrize(("u", "expected"), [(1e-300, 1), (0.25, 1), (0.5, 3), (0.75, 3), (1 - 2**-53, 3)])
def test_inverse_cdf_at_boundaries_skips_zero_weights(u, expected):
    """u = .5 is exactly the boundary after index 1: the interval is closed below, and index 2 has no weight."""
    log_weights = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    assert inverse_cdf(log_weights, u) == expected


def test_inverse_cdf_when_u_times_the_sum_rounds_up_to_the_sum():
    """The largest u against weights whose last entry vanishes in rounding: the last index of positive weight."""
    assert inverse_cdf(np.array([0.0, -40.0, -np.inf]), 1.0) == 1


@pytest.mark.parametrize("bad", [[-np.inf, -np.inf], [0.0, np.nan], [np.inf, 0.0]])
def test_inverse_cdf_refuses_weights_that_are_no_distribution(bad):
    with pytest.raises(ArgumentError, match="cannot draw from weights"):
        inverse_cdf(np.array(bad), 0.5)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None])
def test_stream_refuses_a_seed_that_is_no_count(seed):
    with pytest.raises(ArgumentError, match="seed must be an integer >= 0"):
        Stream(seed)


def test_stream_refuses_an_empty_range():
    with pytest.raises(ArgumentError, match="n >= 1"):
        Stream(0).integers(0)


def test_asking_again_for_a_purpose_gives_the_same_numbers():
    """The contract that resuming and skipping rest on; a stream with hidden global state would break it."""
    first = Stream(3, prompt=5, chain=1).step(7).at("token", 4)
    again = Stream(3, prompt=5, chain=1).step(7).at("token", 4)
    assert [first.uniform() for _ in range(5)] == [again.uniform() for _ in range(5)]


def test_a_draw_does_not_shift_another_purpose():
    """Would catch a shared counter: an optimisation that skips a draw must not change any other number."""
    step = Stream(0).step(1)
    expected = Stream(0).step(1).at("accept").uniform()
    for _ in range(3):
        step.at("proposal").uniform()
    step.uniform()
    assert step.at("accept").uniform() == expected


def test_numpy_integers_name_the_same_stream():
    """An index that comes out of an array is the same index (NumPy refuses `int64 & 2**64-1`)."""
    assert (
        Stream(np.int64(2)).step(np.int64(3)).at("a", np.int32(4)).uniform() == Stream(2).step(3).at("a", 4).uniform()
    )


def test_purposes_nest_and_their_order_counts():
    s = Stream(0).step(0)
    numbers = [
        s.at("a").at("b").uniform(),
        s.at("b").at("a").uniform(),
        s.at("a", 1).at("b").uniform(),
        s.at("a").at("b", 1).uniform(),
        s.at("ab").uniform(),
        s.at("a").uniform(),
    ]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1])
def test_uniforms_lie_strictly_inside_the_unit_interval(word, monkeypatch):
    """At every word, the largest too: log u must be finite, and u = 1 is above every bound."""
    monkeypatch.setattr("powermc.choices._philox", lambda key, counter: word)
    assert 0 < Stream(1).uniform() < 1
    assert Stream(1).level().below(0.0)
    assert Stream(1).integers(7) in (0, 3, 6)


def test_level_is_drawn_once():
    """Comparing again must not draw again: exact early rejection compares one level many times."""
    s = Stream(0).step(0).at("accept")
    level = s.level()
    assert level.log_u == math.log(Stream(0).step(0).at("accept").uniform())
    assert level.below(level.log_u + 1e-9)
    assert not level.below(level.log_u)
    assert not level.below(math.nan)
    assert not level.below(-math.inf)
    assert level.below(0.0)


def test_level_of_a_number():
    assert UniformLevel(0.25).log_u == math.log(0.25)


@given(st.integers(1, 50), st.integers(0, 1000))
def test_integers_stay_in_range(n, seed):
    assert 0 <= Stream(seed).integers(n) < n

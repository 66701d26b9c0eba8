"""The enumerator itself: every leaf once, with its probability, through the interface kernels use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ChainError
from powermc.kernels import Metropolis
from powermc.proposals import RandomWalk
from powermc.targets import Table
from powermc.testing import (
    assert_carries_state,
    assert_invariant,
    assert_law,
    assert_stochastic,
    enumerate_kernel,
    enumerate_outcomes,
    prove,
    transition_matrix,
    two_step_matrix,
)
from powermc.testing.enumeration import _fingerprint
from powermc.toy import TabularModel
from powermc.types import State


def outcomes(function):
    """[(value, probability)] of a plain function of choices."""

    def program(choices):
        return function(choices)
        yield

    return [(leaf.value, leaf.probability) for leaf in enumerate_outcomes([program])[0]]


def law(function):
    """{value: probability}."""
    found: dict = {}
    for value, p in outcomes(function):
        found[value] = found.get(value, 0.0) + p
    return found


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=5))
def test_categorical_has_one_leaf_per_positive_weight(log_weights):
    weights = np.exp(log_weights)
    padded = np.array([-np.inf, *log_weights, -np.inf])
    found = outcomes(lambda c: c.categorical(padded))
    assert [v for v, _ in found] == list(range(1, len(weights) + 1))
    assert np.allclose([p for _, p in found], weights / weights.sum(), rtol=1e-12)


def test_dependent_draws_make_a_tree():
    """The second draw's range depends on the first: leaves are paths of the tree, and none is missed or doubled."""

    def two(c):
        first = c.at("first").integers(3)
        return first, c.at("second").integers(first + 1)

    assert law(two) == pytest.approx({(a, b): 1 / 3 / (a + 1) for a in range(3) for b in range(a + 1)})
    assert len(outcomes(two)) == 6


@given(st.lists(st.floats(0.01, 1.5), min_size=1, max_size=4))
def test_a_level_is_one_uniform_number_however_often_it_is_compared(bounds):
    """Comparisons of one level are consistent: u < a implies u < b for a <= b. The law of the answers is that of a u
    uniform on (0, 1): catches an enumerator that flips a fresh coin for each."""

    def compare(c):
        level = c.level()
        return tuple(level.below(math.log(b)) for b in bounds)

    expected: dict = {}
    cuts = sorted({0.0, 1.0, *(min(b, 1.0) for b in bounds)})
    for low, high in pairwise(cuts):
        middle = (low + high) / 2
        key = tuple(middle < b for b in bounds)
        expected[key] = expected.get(key, 0.0) + high - low
    assert law(compare) == pytest.approx(expected)


def test_a_level_is_never_below_minus_infinity_or_nan():
    assert law(lambda c: (c.level().below(-math.inf), c.level().below(math.nan), c.level().below(0.0))) == {
        (False, False, True): 1.0
    }


def test_a_ratio_of_one_up_to_rounding_is_no_branch():
    """Another batch shape may turn log r = 0 into -1e-16; -1e-9 is a probability and is kept."""
    assert law(lambda c: c.level().below(-1e-16)) == {True: 1.0}
    assert law(lambda c: c.level().below(-1e-9)) == pytest.approx({True: 1 - 1e-9, False: 1e-9})
    assert law(lambda c: c.level().below(math.log(1e-15)))[True] == pytest.approx(1e-15)


@pytest.mark.parametrize("later", [lambda c: 0, lambda c: c.at("x").integers(1)])
def test_a_run_that_does_not_repeat_itself_is_refused(later):
    """Choices that vary between repetitions would make the enumerator count a leaf twice."""
    runs = iter(range(10))
    with pytest.raises(AssertionError, match="came to other ones"):
        outcomes(lambda c: c.at("x").integers(2) if next(runs) == 0 else later(c))


def test_two_objects_for_one_purpose_are_refused():
    """A production stream would give both the same number; as independent draws they would prove another kernel."""
    with pytest.raises(AssertionError, match=r"two draws share the purpose \('x', 0\)"):
        outcomes(lambda c: (c.at("x").integers(2), c.at("x").integers(2)))
    with pytest.raises(AssertionError, match="two draws share the purpose"):
        outcomes(lambda c: (c.at("x").integers(2), c.at("x", 0).level().below(-1.0)))
    assert len(outcomes(lambda c: (c.at("x").integers(2), c.at("x", 1).integers(2)))) == 4


def test_one_object_may_draw_again():
    def twice(c):
        x = c.at("x")
        return x.integers(2), x.integers(2)

    assert law(twice) == pytest.approx({(a, b): 0.25 for a in range(2) for b in range(2)})


@pytest.mark.parametrize("bad", [lambda c: c.integers(0), lambda c: c.categorical(np.array([-np.inf]))])
def test_draws_from_nothing_are_refused(bad):
    with pytest.raises(AssertionError):
        outcomes(bad)


def test_an_error_in_any_leaf_is_raised():
    """A kernel that fails with small probability must not be proved on the rest."""

    def program(choices):
        if choices.categorical(np.log([0.999, 0.001])) == 1:
            raise ChainError("rare")
        return 0
        yield

    with pytest.raises(ChainError, match="rare"):
        enumerate_outcomes([program])


@dataclass(frozen=True)
class Rows:
    """A kernel on integers given by its matrix; with `drift` it remembers how many steps it has taken, wrongly."""

    matrix: Any
    drift: float = 0.0
    outside: bool = False

    fields: Any = None

    def init(self, value):
        return State(value, 0.0)
        yield

    def step(self, choices, state):
        with np.errstate(divide="ignore"):
            row = np.log(np.array(self.matrix[state.value]))
        j = choices.categorical(row + (self.drift if state.log_density else 0.0) * np.arange(len(row)))
        return State(99 if self.outside and j == 1 else j, self.drift), {}
        yield


CHAIN = ((0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5))


def test_the_matrix_is_the_kernels():
    assert np.allclose(transition_matrix(Rows(CHAIN), range(3)), CHAIN, atol=1e-15)
    assert np.allclose(two_step_matrix(enumerate_kernel(Rows(CHAIN), range(3))), np.array(CHAIN) @ CHAIN, atol=1e-15)


def test_a_state_that_remembers_is_found_by_two_steps_only():
    kernel = Rows(CHAIN, drift=0.1)
    assert_invariant(kernel, range(3))
    with pytest.raises(AssertionError, match="a state keeps something that its value does not determine"):
        assert_carries_state(kernel, range(3))


def test_a_step_out_of_the_space_is_refused():
    with pytest.raises(AssertionError, match="a step reached 99, which is not in the supported space"):
        enumerate_kernel(Rows(CHAIN, outside=True), range(3))


def test_a_space_that_lists_a_value_twice_is_refused():
    with pytest.raises(AssertionError, match="lists a value twice"):
        enumerate_kernel(Rows(CHAIN), [0, 1, 2, 1])


def test_an_empty_support_is_refused():
    with pytest.raises(AssertionError, match="supports no value"):
        enumerate_kernel(Metropolis(Table({}), RandomWalk(lambda v: [v])), range(3))


def test_unsupported_values_are_left_out():
    found = enumerate_kernel(Metropolis(Table({0: 0.0, 2: 0.0}), RandomWalk(lambda v: [0, 1, 2])), range(3))
    assert found.values == [0, 2]
    assert np.allclose(found.matrix, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])


def test_lost_probability_is_found():
    found = enumerate_kernel(Rows(CHAIN), range(3))
    with pytest.raises(AssertionError, match=r"sums to 1 -0\.001"):
        assert_stochastic(replace(found, matrix=found.matrix * 0.999))


def test_a_target_other_than_the_one_meant_is_found():
    """prove() alone takes the kernel's word for its target."""
    kernel = Metropolis(Table({0: 0.0, 1: 1.0}), RandomWalk(lambda v: [0, 1]))
    prove(kernel, range(2))
    prove(kernel, range(2), law=[1.0, math.e])
    with pytest.raises(AssertionError, match="too much"):
        prove(kernel, range(2), law=[1.0, 2.0])
    with pytest.raises(AssertionError, match="too much"):
        assert_law(kernel, range(3), [1.0, math.e, 0.5])


def test_the_space_must_be_named():
    with pytest.raises(TypeError, match="name the space"):
        assert_invariant(Rows(CHAIN))


@dataclass(frozen=True)
class Opaque:
    inside: Any


def test_fingerprints_tell_apart_whatever_a_step_could():
    """Two-step enumeration runs states with one fingerprint once: a collision would hide a stale state."""
    different = [
        State(1, 0.0), State(1, -0.0), State(1, math.nextafter(0.0, 1.0)), State(1.0, 0.0), State("1", 0.0),
        State(np.float32(1), 0.0), State(np.float64(1), 0.0), State((1,), 0.0), State([1], 0.0),
        State(np.array([1]), 0.0), State(np.array([[1]]), 0.0), State(np.array([1.0]), 0.0),
        State({"a": 1}, 0.0), State({"a": 2}, 0.0), State(Opaque(object()), 0.0), State(Opaque(object()), 0.0),
        State(None, 0.0), State(True, 0.0),
    ]  # fmt: skip
    assert len({_fingerprint(state) for state in different}) == len(different)
    shared = object()
    for a, b in [
        (State((1, 2.0, "x", None), math.nan), State((1, 2.0, "x", None), math.nan)),
        (State(Opaque(shared), 0.0), State(Opaque(shared), 0.0)),
        (State(np.array([1.0, np.nan]), 0.0), State(np.array([1.0, np.nan]), 0.0)),
    ]:
        assert _fingerprint(a) == _fingerprint(b)


def test_fingerprints_take_models_by_identity():
    """Two equal models are two: a path scored by one is scored anew for the other."""
    one, other = (TabularModel(np.full((1, 3), 1 / 3), 0) for _ in range(2))
    assert _fingerprint(Opaque(one)) == _fingerprint(Opaque(one))
    assert _fingerprint(Opaque(one)) != _fingerprint(Opaque(other))


def test_fingerprints_see_attributes_that_are_no_fields():
    a, b = Opaque(1), Opaque(1)
    vars(b)["hidden"] = 2
    assert _fingerprint(a) != _fingerprint(b)

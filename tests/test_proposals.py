"""Proposals on plain spaces, each against its definition by enumeration of its moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.proposals import Independent, RandomWalk
from powermc.testing import enumerate_outcomes
from powermc.testing import strategies as toys

VALUES = range(5)


def moves(proposal, value):
    """{new value: (probability, log_hastings)}, the null move under None."""
    found: dict = {}
    for move, probability in enumerate_outcomes([lambda choices: proposal.propose(choices, value)])[0]:
        key = None if move.null else move.value
        found[key] = (found.get(key, (0.0, 0.0))[0] + probability, move.log_hastings)
    return found


@given(st.one_of(toys.graphs(VALUES).map(RandomWalk), toys.tables(VALUES).map(lambda t: Independent(t.log_weights))))
def test_log_hastings_is_the_ratio_of_proposal_probabilities(proposal):
    """log q(x | y) - log q(y | x) from the enumerated q itself: catches a missing, inverted or wrong factor."""
    q = {x: moves(proposal, x) for x in VALUES}
    for x in VALUES:
        for y, (forward, log_hastings) in q[x].items():
            if y is not None:
                assert log_hastings == pytest.approx(math.log(q[y][x][0] / forward), abs=1e-9)


def test_a_value_without_neighbours_stays():
    assert moves(RandomWalk(lambda v: []), 0) == {None: (pytest.approx(1.0), 0.0)}


def test_independent_makes_no_move_from_where_it_could_not_return():
    proposal = Independent({0: 0.0, 1: -math.inf})
    assert set(moves(proposal, 1)) == {None}
    assert set(moves(proposal, 2)) == {None}
    assert set(moves(proposal, 0)) == {0}


def test_independent_draws_from_its_weights():
    found = moves(Independent({"a": math.log(3.0), "b": 0.0}), "a")
    assert np.allclose([found["a"][0], found["b"][0]], [0.75, 0.25])


def test_independent_refuses_no_positive_weight():
    with pytest.raises(ArgumentError, match="positive weight"):
        Independent({0: -math.inf})

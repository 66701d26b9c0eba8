"""Every mutant fails the harness, on a fixed model and wherever hypothesis looks; its right twin passes.

A suite in which one of these tests fails proves nothing about the kernels.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, find, settings

from powermc.kernels import Metropolis
from powermc.testing import (
    assert_carries_state,
    assert_invariant,
    assert_irreducible,
    assert_reversible,
    assert_stochastic,
    enumerate_kernel,
    prove,
)
from powermc.testing import strategies as toys
from tests.exactness.mutants import MUTANTS, PLAIN, TABLE, VALUES

ASSERTIONS = {
    "stochastic": assert_stochastic,
    "invariant": assert_invariant,
    "irreducible": assert_irreducible,
    "reversible": assert_reversible,
    "carries_state": assert_carries_state,
}


def failures(kernel, paths):
    """The names of all assertions that fail; {"enumeration"} if it cannot even be enumerated."""
    try:
        found = enumerate_kernel(kernel, paths)
    except AssertionError:
        return {"enumeration"}
    failed = set()
    for name, check in ASSERTIONS.items():
        try:
            check(found)
        except AssertionError:
            failed.add(name)
    return failed


def proved(kernel, paths):
    try:
        prove(kernel, paths)
    except AssertionError:
        return False
    return True


def search(strategy, condition):
    """The first of 30 drawn examples that satisfies the condition; `find` raises `NoSuchExample` if none does."""
    return find(
        strategy,
        condition,
        settings=settings(
            max_examples=30,
            phases=[Phase.generate],
            database=None,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_on_the_fixed_model(name, peaked):
    """The exact set of assertions that find it: none of them is there for nothing."""
    mutant = MUTANTS[name]
    assert failures(mutant.wrong(peaked), peaked.paths) == mutant.found_by
    assert not proved(mutant.wrong(peaked), peaked.paths)
    assert failures(mutant.right(peaked), peaked.paths) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_found_by_search(name):
    """Within 30 drawn models."""
    mutant = MUTANTS[name]
    toy = search(toys.toys(max_paths=15), lambda toy: not proved(mutant.wrong(toy), toy.paths))
    assert failures(mutant.right(toy), toy.paths) == set()


@pytest.mark.parametrize("name", PLAIN)
def test_on_a_plain_space(name):
    wrong, right, argument = PLAIN[name]
    assert failures(Metropolis(TABLE, wrong(argument)), VALUES) == {"invariant", "reversible"}
    assert failures(Metropolis(TABLE, right(argument)), VALUES) == set()


@pytest.mark.parametrize("name", ["missing cut ratio", "missing log Z", "wrong sign of the Hastings term"])
def test_a_failure_names_the_place(name, peaked):
    """The message is what a user debugs with: the value and by how much it is off."""
    with pytest.raises(AssertionError, match=r"pi P differs from pi by [+-]\d.*at Path\(\[.*\(pi = "):
        prove(MUTANTS[name].wrong(peaked), peaked.paths)

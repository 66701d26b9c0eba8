"""Proofs and tests of Markov kernels: enumeration, assertions, sequential tests, hypothesis strategies."""

from powermc.testing.assertions import (
    assert_carries_state,
    assert_invariant,
    assert_irreducible,
    assert_reversible,
    assert_same_kernel,
    assert_stochastic,
    prove,
)
from powermc.testing.enumeration import (
    Outcome,
    Script,
    Transitions,
    enumerate_kernel,
    enumerate_outcomes,
    transition_matrix,
    two_step_matrix,
)

__all__ = [
    "Outcome",
    "Script",
    "Transitions",
    "assert_carries_state",
    "assert_invariant",
    "assert_irreducible",
    "assert_reversible",
    "assert_same_kernel",
    "assert_stochastic",
    "enumerate_kernel",
    "enumerate_outcomes",
    "prove",
    "transition_matrix",
    "two_step_matrix",
]

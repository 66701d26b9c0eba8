"""Proofs and tests of Markov kernels: enumeration, assertions, sequential tests.

Three lines prove a kernel of your own:

    from powermc.testing import paths_of, prove
    paths = paths_of(Space(eos, horizon=3), vocab_size=3)
    prove(MyKernel(...), paths)

`powermc.testing.strategies` draws models and kernels for hypothesis; import it by name, as hypothesis is optional.
"""

from powermc.testing.assertions import (
    assert_carries_state,
    assert_invariant,
    assert_irreducible,
    assert_law,
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
from powermc.testing.spaces import EndsWith, paths_of, prefixes_of
from powermc.testing.statistics import (
    StreamsReport,
    Verdict,
    assert_streams,
    bounded_mean_p,
    chi_square_p,
    detectable_variation,
    frequencies,
    multinomial_p,
    sequential_test,
)

__all__ = [
    "EndsWith",
    "Outcome",
    "Script",
    "StreamsReport",
    "Transitions",
    "Verdict",
    "assert_carries_state",
    "assert_invariant",
    "assert_irreducible",
    "assert_law",
    "assert_reversible",
    "assert_same_kernel",
    "assert_stochastic",
    "assert_streams",
    "bounded_mean_p",
    "chi_square_p",
    "detectable_variation",
    "enumerate_kernel",
    "enumerate_outcomes",
    "frequencies",
    "multinomial_p",
    "paths_of",
    "prefixes_of",
    "prove",
    "sequential_test",
    "transition_matrix",
    "two_step_matrix",
]

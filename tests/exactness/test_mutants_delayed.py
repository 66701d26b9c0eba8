"""Every mutant of delayed acceptance and substitution fails the harness, on a fixed pair and wherever hypothesis looks.

A suite in which one of these tests fails proves nothing about these kernels.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.kernels import DelayedAcceptance
from powermc.sequences import UncertainTail
from powermc.testing import assert_same_kernel, prove
from powermc.testing import pairs as on
from tests.exactness.mutants_delayed import MUTANTS, WrittenOut, gate, stages, suffix, unsure, written
from tests.exactness.test_mutants import failures, proved, search

FIXED = on.Pair(written(2, {(): (0.55, 0.10, 0.35), (0,): (0.05, 0.80, 0.15), (1,): (0.60, 0.10, 0.30)}), unsure(2))


@pytest.mark.parametrize("name", MUTANTS)
def test_on_the_fixed_pair(name):
    """The exact set of assertions that find it."""
    mutant = MUTANTS[name]
    assert failures(mutant.wrong(FIXED), FIXED.paths) == mutant.found_by
    assert not proved(mutant.wrong(FIXED), FIXED.paths)
    assert failures(mutant.right(FIXED), FIXED.paths) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_found_by_search(name):
    """Within 30 drawn pairs."""
    mutant = MUTANTS[name]
    pair = search(on.pairs(max_paths=7), lambda pair: not proved(mutant.wrong(pair), pair.paths))
    prove(mutant.right(pair), pair.paths, law=pair.target.power(2.0), carried=False)


@given(st.data())
@settings(max_examples=5)
def test_the_mutants_bend_the_production_kernel(data):
    """`WrittenOut` is `DelayedAcceptance`, gate and all: what each mutant changes is what makes it wrong."""
    pair = data.draw(on.pairs())
    for chosen in (None, gate(pair)):
        right, bent = (kind(stages(pair), suffix(pair), chosen) for kind in (DelayedAcceptance, WrittenOut))
        assert_same_kernel(bent, right, pair.paths)


class OwnTail(UncertainTail):
    """A threshold that sees the tail of the very value it is asked about."""

    def uncertain(self, value, auxiliary):
        path, _ = yield from super().uncertain(value, auxiliary)
        return path, bool(path.entropy[auxiliary.position :].max() > 0.3 * sum(path.tokens))


def test_a_gate_cannot_break_the_symmetry_by_itself():
    """The kernel takes *or* over two calls of one function of one value: whatever that function is, the kernel is
    exact. What breaks it is a threshold of one tail applied to both: "thresholds see the tail" above."""
    kernel = DelayedAcceptance(stages(FIXED), suffix(FIXED), OwnTail(FIXED.surrogate.model, eta=0.5))
    prove(kernel, FIXED.paths, law=FIXED.target.power(2.0))

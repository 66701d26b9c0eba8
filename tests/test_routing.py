"""Choices by the cut, and the errors of delayed acceptance's parts."""

from __future__ import annotations

import numpy as np
import pytest

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.kernels import DelayedAcceptance
from powermc.proposals import RandomWalk
from powermc.scheduling import run
from powermc.sequences import ByCut, Cut, Entropy, Length, SequenceProbability, Suffix
from powermc.targets import Table
from powermc.toy import TabularModel


def test_the_rule_picks():
    chosen = ByCut(["a", "b"], lambda cut: np.int64(cut.position % 2))
    assert [chosen.given(Cut(m, (0,) * m)) for m in range(3)] == ["a", "b", "a"]


@pytest.mark.parametrize(("index", "shown"), [(2, "2"), (-1, "-1"), (0.0, r"0\.0"), (None, "None"), ("a", "'a'")])
def test_a_rule_that_returns_no_index(index, shown):
    """-1 too: Python would take it for the last option."""
    with pytest.raises(ArgumentError, match=f"returned {shown} for a cut at 3; return an index from 0 to 1"):
        ByCut(["a", "b"], lambda cut: index).given(Cut(3, (0, 0, 0)))


def test_errors():
    with pytest.raises(ArgumentError, match="ByCut needs at least one option, got none"):
        ByCut([], lambda cut: 0)
    with pytest.raises(ArgumentError, match="a cut is needed; use Suffix, Substitution"):
        ByCut(["a"], lambda cut: 0).given(None)
    walk = RandomWalk(lambda v: [1 - v])
    with pytest.raises(ArgumentError, match="at least one stage, the target; got none"):
        DelayedAcceptance([], walk)
    table = Table({0: 0.0, 1: 0.0})
    with pytest.raises(ArgumentError, match="the last stage is the target and cannot depend on the move, got ByCut"):
        DelayedAcceptance([table, ByCut([table], lambda cut: 0)], walk)


def test_the_rule_sees_the_prefix_of_both_paths_only(peaked):
    """For stages and generators: the cut holds what the current and the proposed path share."""
    shown = []

    def rule(cut):
        shown.append(cut)
        return cut.position % 2

    other = TabularModel.random(0, vocab_size=3, order=1)
    models = ByCut([peaked.model, other], rule)
    stage = ByCut([SequenceProbability(peaked.model), SequenceProbability(other)], rule)
    kernel = DelayedAcceptance([stage, SequenceProbability(other)], Suffix(models, peaked.space, Length()))
    state = run(kernel.init(peaked.paths[0]))
    for i in range(100):
        before = state.value
        state, info = run(kernel.step(Stream(0).step(i), state))
        m = info["cut"]
        assert set(shown) == {Cut(m, before.tokens[:m])} == {Cut(m, state.value.tokens[:m])}
        shown.clear()


class Watched(TabularModel):
    """Remembers that it was asked anything."""

    def answer(self, requests):
        self.__dict__["asked"] = True
        return super().answer(requests)


@pytest.mark.parametrize(("law", "expected"), [(Length(), False), (Entropy(), True)])
def test_the_first_model_is_asked_only_if_the_cut_law_needs_it(law, expected, peaked):
    """An exit layer that is not used costs nothing under `length` and `horizon`."""
    first = Watched(peaked.model.table, peaked.model.order)
    models = ByCut([first, TabularModel.random(0, vocab_size=3, order=1)], lambda cut: 1)
    move = run(Suffix(models, peaked.space, law).propose(Stream(0).step(0), peaked.paths[0]))
    assert move.value.by is models.options[1]
    assert ("asked" in first.__dict__) is expected

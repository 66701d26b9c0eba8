"""What a gate measures, what it may see, and what it refuses; exactness under gates is shown in tests/exactness."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.kernels import DelayedAcceptance
from powermc.proposals import RandomWalk
from powermc.scheduling import run
from powermc.sequences import ByCut, Cut, Length, Path, Prompt, Suffix, UncertainTail
from powermc.targets import Table
from powermc.testing import strategies as toys
from powermc.toy import TabularModel


def with_uncertainty(model, entropy, margin):
    """A path that `model` is taken to have scored, with these entropies and margins."""
    n = len(entropy)
    path = Path(Prompt(), (0,) * n, False)
    return path.with_scores(model, np.zeros(n), np.array(entropy, float), np.array(margin, float), {}, None)


MODEL = TabularModel.random(0, vocab_size=8, order=1)
X = with_uncertainty(MODEL, [2.0, 0.5, 1.5, 1.0], [0.1, 0.9, 0.5, 0.7])


def uncertain(gate, path, m):
    return run(gate.uncertain(path, Cut(m, path.tokens[:m])))[1]


@pytest.mark.parametrize(
    ("m", "thresholds", "aggregate", "expected"),
    [
        (0, {"eta": 1.99}, "max", True),
        (1, {"eta": 1.99}, "max", False),  # what comes before the cut does not count
        (1, {"eta": 1.49}, "max", True),
        (1, {"eta": 1.5}, "max", False),  # equality is not uncertain
        (1, {"eta": 0.99}, "mean", True),
        (1, {"eta": 1.0}, "mean", False),
        (1, {"delta": 0.51}, "max", True),
        (1, {"delta": 0.5}, "max", False),
        (1, {"delta": 0.71}, "mean", True),
        (1, {"delta": 0.69}, "mean", False),
        (3, {"eta": 0.9, "delta": 0.1}, "max", True),
        (3, {"eta": 1.1, "delta": 0.71}, "max", True),
        (3, {"eta": 1.1, "delta": 0.69}, "max", False),
        (4, {"eta": 0.0, "delta": 1.0}, "max", False),  # an empty tail is certain
        (4, {"eta": 0.0, "delta": 1.0}, "mean", False),
    ],
)
def test_strictly_over_eta_or_strictly_under_delta(m, thresholds, aggregate, expected):
    assert uncertain(UncertainTail(MODEL, aggregate=aggregate, **thresholds), X, m) is expected


@given(st.data())
def test_entropy_and_margin_of_the_models_own_rows(data):
    """Against the table: at temperature 1, the tail's positions only, for any model and path."""
    toy = data.draw(toys.toys(max_paths=15))
    x = data.draw(st.sampled_from(toy.paths))
    m = data.draw(st.integers(0, len(x) - 1))
    rows = [toy.model.table[toy.model.context(x.tokens[:t])] for t in range(m, len(x))]
    entropy = [-sum(v * math.log(v) for v in row if v > 0) for row in rows]
    margin = [np.sort(row)[-1] - np.sort(row)[-2] for row in rows]
    most = math.log(toy.model.vocab_size)
    for aggregate, h, g in [("max", max(entropy), min(margin)), ("mean", np.mean(entropy), np.mean(margin))]:
        for off, above in [(-1e-6, True), (1e-6, False)]:
            if 0 <= h + off < most:
                assert uncertain(UncertainTail(toy.model, eta=h + off, aggregate=aggregate), x, m) is above
            if 0 < g - off <= 1:
                assert uncertain(UncertainTail(toy.model, delta=g - off, aggregate=aggregate), x, m) is above


def test_the_gate_completes_what_its_model_has_not_scored(peaked):
    """The answer is kept: the path comes back with this model's view of it, and is not asked about again."""
    gate = UncertainTail(peaked.model, eta=0.5)
    x = with_uncertainty(MODEL, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    asked = list(_requests(gate.uncertain(x, Cut(1, (0,)))))
    assert len(asked) == 1
    done, _ = run(gate.uncertain(x, Cut(1, (0,))))
    assert done.scored(peaked.model)
    assert done.scored(MODEL)
    assert list(_requests(gate.uncertain(done, Cut(1, (0,))))) == []


def _requests(program):
    try:
        request = next(program)
        while True:
            yield request
            request = program.send(request.oracle.answer([request])[0])
    except StopIteration:
        return


def test_thresholds_are_shown_the_cut_and_nothing_else(peaked):
    """Position and prefix: two paths with the same prefix and other tails give the same threshold."""
    shown = []

    def eta(cut):
        shown.append(cut)
        return 0.4

    gate = UncertainTail(peaked.model, eta=eta, delta=eta)
    kernel = DelayedAcceptance([peaked.metropolis(1.0).target], Suffix(peaked.model, peaked.space, Length()), gate)
    state = run(kernel.init(peaked.paths[0]))
    for i in range(100):
        state, _ = run(kernel.step(Stream(0).step(i), state))
    assert {type(cut) for cut in shown} == {Cut}
    assert all(len(cut.prefix) == cut.position for cut in shown)
    assert {cut.position for cut in shown} == {0, 1, 2}


def test_model_and_thresholds_by_the_cut(peaked):
    """The model that the cut chooses is the one that is asked."""
    sure = TabularModel(np.eye(3)[[0] * 16] * 1.0, 2)
    gate = UncertainTail(ByCut([sure, peaked.model], lambda cut: cut.position), eta=lambda cut: 0.3 * cut.position)
    x = peaked.paths[0]
    assert [uncertain(gate, x, m) for m in (0, 1)] == [False, True]
    assert not uncertain(UncertainTail(peaked.model, eta=lambda cut: math.inf), x, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither eta nor delta; give at least one"),
        ({"eta": -0.1}, "eta must be a number >= 0, got -0.1"),
        ({"eta": math.nan}, "eta must be a number >= 0, got nan"),
        ({"delta": -0.1}, "delta must be a number >= 0, got -0.1"),
        ({"delta": math.nan}, "delta must be a number >= 0, got nan"),
        ({"eta": 2.08}, r"eta 2.08 can never be exceeded, so the gate can never open.*2\.079 nats"),
        ({"eta": math.inf}, "eta inf can never be exceeded"),
        ({"eta": 3}, "eta 3 can never be exceeded"),
        ({"eta": 1.0, "delta": 0}, "no margin is under delta 0, so the gate can never open; use 0 < delta <= 1"),
        ({"delta": 1.1}, "every margin is under delta 1.1, so the gate is always open; use <= 1"),
        ({"eta": 1.0, "aggregate": "median"}, "unknown aggregate 'median'; choose one of max, mean"),
    ],
)
def test_unusable_thresholds(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        UncertainTail(MODEL, **arguments)


def test_the_largest_vocabulary_counts():
    small = TabularModel.random(0, vocab_size=3, order=1)
    UncertainTail(ByCut([small, MODEL], lambda cut: 0), eta=2.0)
    with pytest.raises(ArgumentError, match="can never open"):
        UncertainTail(small, eta=2.0)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_threshold_function_that_returns_nonsense(value):
    gate = UncertainTail(MODEL, eta=lambda cut: value)
    with pytest.raises(ArgumentError, match=f"eta must be a number >= 0, got {value}"):
        uncertain(gate, X, 1)


def test_a_proposal_without_a_cut_cannot_be_gated():
    kernel = DelayedAcceptance([Table({0: 0.0, 1: 0.0})], RandomWalk(lambda v: [1 - v]), UncertainTail(MODEL, eta=1.0))
    with pytest.raises(ArgumentError, match=r"the proposal gave None where a cut is needed.*auxiliary=Cut"):
        run(kernel.step(Stream(0).step(0), run(kernel.init(0))))

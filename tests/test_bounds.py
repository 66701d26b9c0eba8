"""Bounds by themselves: of targets, of cut laws, of what is inherited; and the switch from the settings down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.bounds import Bound, Floor, bound_of, claims, proposed, weighted
from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.kernels import DelayedAcceptance, Metropolis
from powermc.proposals import Independent
from powermc.scheduling import run
from powermc.sequences import Entropy, Horizon, Length, Path, SequenceProbability, scored
from powermc.sequences.cuts import log_most, log_prob
from powermc.settings import Settings
from powermc.targets import Power, Product, Table, Tempered, Tilted
from powermc.testing import strategies as toys
from powermc.types import evaluate
from tests.exactness.mutants_delayed import unsure

INF = math.inf


@given(st.data())
@settings(max_examples=40)
def test_bounds_of_targets_hold_and_are_reached(data):
    """log pi <= exponent * log p + rest everywhere, and no smaller rest would do for a tilted power."""
    toy = data.draw(toys.toys(max_paths=15))
    p, alpha, reward = SequenceProbability(toy.model), data.draw(toys.alphas()), data.draw(toys.rewards(toy))
    most = bound_of(reward, toy.model).rest
    power = Power(p, alpha)
    tilted = Tilted(power, reward.log_density, most)
    other = SequenceProbability(unsure(toy.space.horizon).model)
    targets = [power, tilted, Product((power, reward)), Tempered(p, tilted, 0.25), Power(tilted, 0.5)]
    if toy.model.vocab_size == 3:
        targets.append(Product((tilted, Power(other, 2.0))))
    for target in targets:
        bound = bound_of(target, toy.model)
        assert bound is not None
        for path in toy.paths:
            x, log_density = run(evaluate(target, path))
            log_p = run(evaluate(p, x))[1]
            assert log_density == -INF or log_density <= bound.exponent * log_p + bound.rest + 1e-12
    assert bound_of(tilted, toy.model) == (alpha, most)
    assert bound_of(tilted, object()) == (0.0, most), "at most 0 beside a model it knows nothing of"


def test_what_has_no_bound():
    p = SequenceProbability(unsure(2).model)
    tilted = Tilted(p, lambda x: 0.0)
    for target in (tilted, Power(tilted, 2.0), Product((p, tilted)), Tempered(p, tilted, 0.5), object()):
        assert bound_of(target, p.model) is None
    assert weighted((1, Bound(1, 0)), (1, None)) is None
    assert weighted((0, Bound(1, -INF)), (2, Bound(3, 4))) == (6, 8), "0 * -inf is nothing"
    assert bound_of(Table({}), p.model) == (0, -INF)


def test_what_is_inherited_says_nothing_of_what_is_overridden():
    class Other(Power):
        def log_density(self, value):
            return 0.0

    class Named(Power):
        pass

    class Both(Other):
        def bound(self, model):
            return Bound(0.0, 0.0)

    p = SequenceProbability(unsure(2).model)
    assert bound_of(Other(p, 2.0), p.model) is None
    assert bound_of(Named(p, 2.0), p.model) == (2, 0)
    assert bound_of(Both(p, 2.0), p.model) == (0, 0)
    assert not claims(p, "nothing", "log_density")

    @dataclass(frozen=True)
    class LeavesOneOut(Length):
        def log_weights(self, path):
            return np.zeros(len(path) - 1)

    @dataclass(frozen=True)
    class Own:
        needs_scores = False
        start = 0

        def log_weights(self, path):
            return np.zeros(len(path))

    for law in (LeavesOneOut(), Own()):
        assert log_most(law, 0, 2, None) == 0.0


@given(st.data())
@settings(max_examples=30)
def test_bounds_of_cut_laws(data):
    """log C(m | x) never exceeds the bound of any beginning of x that is longer than m; for `Length` the bound is that
    of the path which ends with the next token."""
    toy = data.draw(toys.toys(max_paths=15))
    horizon = toy.space.horizon
    for start in range(horizon):
        for law in (Length(start), Horizon(horizon, start), Entropy(start)):
            for path in toy.paths:
                x = run(scored(toy.model, path))
                for m in range(start, len(x)):
                    actual = log_prob(law, m, x)
                    for n in range(m + 1, len(x)):
                        most = log_most(law, m, n, x.entropy[:n].tolist())
                        assert actual <= most + 1e-12
                        if isinstance(law, Length) and n == len(x) - 1:
                            assert most == pytest.approx(actual)
    assert log_most(Entropy(), 0, 2, None) == 0.0
    assert log_most(Entropy(), 0, 2, [0.0, 1.0]) == 0.0


def test_a_proposal_without_bounds_is_proposed_as_it_is():
    """Two arguments are all that `propose` has; the floor is for those that ask for it."""
    q = Independent({0: 0.0, 1: 0.0})
    floor = Floor(lambda _: Table({}), Stream(0).level(), 0.0)
    assert run(proposed(q, Stream(1), 0, floor)) == run(q.propose(Stream(1), 0))
    table = Table({0: 0.0, 1: 0.0})
    for kernel in (Metropolis(table, q), DelayedAcceptance([table], q)):
        assert "abandoned" in kernel.fields
        assert run(kernel.step(Stream(0), run(kernel.init(0))))[0].value in (0, 1)


def test_a_reward_over_its_bound_is_an_error():
    tilted = Tilted(Table({0: 0.0, 1: 0.0}), float, at_most=0.5)
    assert tilted.log_density(0) == 0.0
    with pytest.raises(ArgumentError, match=r"reward 1\.0 is over at_most = 0\.5"):
        tilted.log_density(1)


def test_settings():
    """One switch for every kernel of the schedule; the reward's bound reaches the target."""

    class Model:
        vocab_size = 3

    def reward(text: str) -> float:
        return 0.0

    model, space = Model(), unsure(2).space
    for early in (True, False):
        given = Settings(early_rejection=early, reward=reward, reward_at_most=1.5)
        kernel = given.schedule(model, space, str).stage(0).kernel
        assert isinstance(kernel, Metropolis)
        assert kernel.early_rejection is early
        assert isinstance(kernel.target, Tilted)
        assert kernel.target.at_most == 1.5
        screened = given.schedule(model, space, str, given.screening(Model(), 2.0)).stage(0).kernel
        assert [part.early_rejection for part in screened.kernels] == [early, early]
        assert screened.kernels[0].stages[0].at_most == 1.5
        assert given.as_dict()["early_rejection"] is early
        assert given.as_dict()["reward_at_most"] == 1.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward_at_most": 1.0}, "there is none"),
        ({"reward_at_most": INF, "reward": len}, "must be finite, got inf"),
        ({"reward_at_most": math.nan, "reward": len}, "must be finite, got nan"),
        ({"reward_at_most": "1", "reward": len}, "must be a number, got '1'"),
        ({"early_rejection": 1}, "must be True or False, got 1"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ArgumentError, match=message):
        Settings(**given)


def test_paths_are_compared_by_model(peaked):
    """A second model with the same table is another model: the bound is that of the one that draws."""
    twin = type(peaked.model)(peaked.model.table, peaked.model.order)
    assert bound_of(SequenceProbability(peaked.model), twin) == (0, 0)
    assert isinstance(peaked.paths[0], Path)

"""What the strategies draw: the hard cases must come up, and what they shrink to must be easy to read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from powermc.kernels import Cycle, Mixture
from powermc.sequences import ByCut, Entropy, Horizon, Length, Substitution
from powermc.testing import pairs as on
from powermc.testing import strategies as toys

SEARCH = {"database": None, "derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


def flat(kernel):
    parts = getattr(kernel, "kernels", None)
    return [kernel] if parts is None else [kernel, *(k for part in parts for k in flat(part))]


kernels = toys.toys(max_paths=7).flatmap(
    lambda toy: st.tuples(st.just(toy), toys.path_targets(toy).flatmap(lambda target: toys.kernels(toy, target)))
)

pairs = on.pairs(zeros=True)
stages = pairs.flatmap(lambda pair: st.tuples(st.just(pair), on.surrogates(pair, zeros=True)))
gates = on.pairs().flatmap(
    lambda pair: on.gates(
        pair, Substitution(pair.surrogate.model, pair.space, 1), pair.surrogate.model, kind="both", by_cut=True
    )
)


@pytest.mark.parametrize(
    ("strategy", "condition"),
    [
        (toys.toys(), lambda t: (t.model.table == 0).any() and (t.p > 0).sum() > 3),
        (toys.toys(), lambda t: t.power(1.0).max() > 0.9 and (t.p > 0).sum() > 10),
        (toys.toys(), lambda t: len(t.space.eos) == 2),
        (toys.toys(), lambda t: any(x.finished and x.tokens[-1] not in t.space.eos for x in t.paths)),
        (toys.toys(), lambda t: t.space.horizon == 4 and t.model.order == 3),
        (toys.toys(), lambda t: t.space.horizon == 3 and t.model.order == 0),
        (toys.toys(max_paths=40), lambda t: t.model.vocab_size == 4 and t.space.horizon == 3),
        (toys.cut_laws(3), lambda c: isinstance(c, Entropy)),
        (toys.cut_laws(3, start=True), lambda c: isinstance(c, Horizon) and c.start == 2),
        (toys.cut_laws(3, start=True), lambda c: isinstance(c, Length) and c.start == 1),
        (kernels, lambda k: any(isinstance(part, Cycle) for part in flat(k[1][0]))),
        (kernels, lambda k: sum(isinstance(part, Mixture) for part in flat(k[1][0])) == 2),
        (toys.plain_targets(range(4)), lambda t: t.log_density(0) == -np.inf and t.log_density(1) > -np.inf),
        (pairs, lambda p: ((p.target.p > 0) & (p.surrogate.p == 0)).sum() > 1),
        (pairs, lambda p: ((p.target.p == 0) & (p.surrogate.p > 0)).sum() > 1),
        (pairs, lambda p: abs(p.target.p - p.surrogate.p).sum() > 1.8),
        (stages, lambda s: isinstance(s[1], ByCut)),
        (stages, lambda s: isinstance(s[1], on.Table) and -np.inf in s[1].log_weights.values()),
        (stages, lambda s: isinstance(s[1], on.Power) and s[1].base.model is not s[0].surrogate.model),
        (gates, lambda g: callable(g.eta) and callable(g.delta)),
        (toys.graphs(range(4)), lambda g: len({len(g(v)) for v in range(4)}) >= 3),
    ],
)  # fmt: skip
def test_the_hard_cases_come_up(strategy, condition):
    find(strategy, condition, settings=settings(max_examples=200, phases=[Phase.generate], **SEARCH))


def test_everything_shrinks_to_something_simple():
    """A counter-example is read by a person: few paths, uniform rows, no stop rule, alpha and temperature 1."""
    toy = find(toys.toys(), lambda t: len(t.paths) > 6, settings=settings(max_examples=200, **SEARCH))
    assert (toy.model.vocab_size, toy.space.horizon, toy.space.stop) == (3, 2, None)
    assert np.allclose(toy.model.table, 1 / 3)
    assert find(toys.alphas(), lambda a: True, settings=settings(**SEARCH)) == 1.0
    assert find(toys.temperatures(), lambda a: True, settings=settings(**SEARCH)) == 1.0


@given(toys.toys(max_paths=40), toys.alphas())
def test_toys_are_what_they_say(toy, alpha):
    assert toy.p.sum() == pytest.approx(1.0, abs=1e-12)
    assert len(toy.paths) <= 40
    assert toy.model.vocab_size >= 3
    law = toy.power(alpha)
    assert law.sum() == pytest.approx(1.0, abs=1e-12)
    assert ((law > 0) == (toy.p > 0)).all()
    positive = law[law > 0]
    if alpha == 0:
        assert np.allclose(positive, positive[0])


@given(toys.graphs(range(5)))
def test_graphs_are_symmetric_and_connected(graph):
    assert all((b in graph(a)) == (a in graph(b)) for a in range(5) for b in range(5))
    assert all(len(graph(a)) == len(set(graph(a))) for a in range(5))
    assert graph.connects(range(5))


@given(st.data())
def test_rewards_leave_something(data):
    toy = data.draw(toys.toys(max_paths=15))
    reward = data.draw(toys.rewards(toy))
    assert any(p > 0 and reward.log_density(x) > -np.inf for x, p in zip(toy.paths, toy.p, strict=True))


@given(toys.weights(4, zeros=False))
def test_weights_without_zeros_are_all_positive(row):
    assert (row > 0).all()
    assert row.sum() == pytest.approx(1.0)

"""Cut laws against their formulas; that they are needed in the ratio is shown in tests/exactness."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.scheduling import run
from powermc.sequences import Entropy, Horizon, Length, Path, Prompt, cut_law
from powermc.sequences.cuts import log_prob
from powermc.testing import strategies as toys


def scored(toy, path):
    def program():
        return (yield toy.model.score(path, ()))

    return run(program())


def with_entropy(entropy):
    n = len(entropy)
    return Path(Prompt(), (0,) * n, False).with_scores(
        None, np.zeros(n), np.array(entropy, dtype=float), np.zeros(n), {}, None
    )


@given(st.data())
def test_every_law_is_a_distribution_over_cuts(data):
    """Catches a normaliser over the wrong range: the probabilities of all cuts sum to 1 wherever one is possible."""
    toy = data.draw(toys.toys(max_paths=15))
    law = data.draw(toys.cut_laws(toy.space.horizon, start=True))
    for path in toy.paths:
        x = scored(toy, path)
        p = [math.exp(log_prob(law, m, x)) for m in range(-1, toy.space.horizon + 2)]
        assert sum(p) == pytest.approx(1.0, abs=1e-12) or not len(law.log_weights(x))
        assert all(v == 0 for v in p[: law.start + 1])


@given(st.integers(1, 6), st.integers(0, 7))
def test_length_is_uniform_up_to_and_including_the_last_token(n, start):
    """The last position is the end token's: left out, a chain cannot take it back."""
    x = with_entropy([1.0] * n)
    for m in range(n):
        expected = -math.log(n - start) if m >= start else -math.inf
        assert log_prob(Length(start), m, x) == pytest.approx(expected, abs=1e-12)
    assert log_prob(Length(start), n, x) == -math.inf


def test_horizon_does_not_look_at_the_path():
    for n in (1, 3, 5):
        assert log_prob(Horizon(5, 1), 4, with_entropy([1.0] * n)) == pytest.approx(-math.log(4))


@pytest.mark.parametrize(("block", "cuts"), [(1, [4]), (2, [4]), (3, [3, 4]), (5, range(5)), (9, range(5))])
def test_block_is_uniform_on_the_last_block(block, cuts):
    law = cut_law("block", start=0, horizon=5, block_size=block)
    x = with_entropy([1.0] * 5)
    assert [m for m in range(6) if log_prob(law, m, x) > -math.inf] == list(cuts)


def test_entropy_weighs_every_step_the_one_that_ended_included():
    """The design's trap: a sum over the tail only, or one that forgets the step which emitted the end token."""
    x = with_entropy([0.5, 0.0, 1.5, 2.0])
    p = [math.exp(log_prob(Entropy(), m, x)) for m in range(4)]
    assert p == pytest.approx([0.125, 0.0, 0.375, 0.5])
    assert math.exp(log_prob(Entropy(2), 3, x)) == pytest.approx(2.0 / 3.5)


@given(toys.toys(max_paths=15))
def test_entropy_uses_the_models_own_rows(toy):
    """h_t = -sum p log p of the raw row, whatever the temperature of the proposal."""
    for path in toy.paths:
        x = scored(toy, path)
        for t, h in enumerate(x.entropy):
            row = toy.model.table[toy.model.context(path.tokens[:t])]
            assert h == pytest.approx(-sum(v * math.log(v) for v in row if v > 0), abs=1e-12)


def test_a_path_without_entropy_has_no_cut():
    assert len(Entropy().log_weights(with_entropy([0.0, 0.0]))) == 0
    assert log_prob(Entropy(), 0, with_entropy([0.0, 0.0])) == -math.inf


def test_entropy_law_asks_for_entropies():
    with pytest.raises(ArgumentError, match="needs a path with its entropies"):
        Entropy().log_weights(Path(Prompt(), (0,), False))


def test_names():
    assert cut_law("length", start=2, horizon=9, block_size=3) == Length(2)
    assert cut_law("horizon", start=2, horizon=9, block_size=3) == Horizon(9, 2)
    assert cut_law("block", start=8, horizon=9, block_size=3) == Horizon(9, 8)
    assert cut_law("entropy", start=2, horizon=9, block_size=3) == Entropy(2)
    with pytest.raises(ArgumentError, match="unknown cut law 'middle'; choose one of length, horizon, block, entropy"):
        cut_law("middle", start=0, horizon=9, block_size=3)

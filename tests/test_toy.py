"""Tabular models and the compiled enumeration, against the same things done slowly."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.scheduling import run
from powermc.sequences import Space
from powermc.testing import EndsWith, chi_square_p, sequential_test
from powermc.testing import strategies as toys
from powermc.toy import TabularModel, exact_law


@given(toys.toys(stop=False), st.sampled_from([0.0, 0.5, 1.0, 4.0]))
def test_exact_law_is_the_product_of_table_entries(toy, alpha):
    """Every path of positive probability, in order, with its log p; and pi at any alpha. Slow reference: `Toy.p`."""
    law = exact_law(toy.model, toy.space)
    supported = [i for i, p in enumerate(toy.p) if p > 0]
    assert [x.tokens for x in law.paths(toy.space)] == [toy.paths[i].tokens for i in supported]
    assert np.allclose(np.exp(law.log_p), toy.p[supported], rtol=1e-12)
    assert np.allclose(law.power(alpha), toy.power(alpha)[supported], rtol=1e-10)
    assert toy.p.sum() == pytest.approx(1.0, abs=1e-12)


def test_end_ids_that_are_no_tokens_end_nothing(peaked):
    """Checkpoints say -1 for "none"; as an index it would be the last token."""
    law = exact_law(peaked.model, Space(frozenset({-1, 7}), 2))
    assert (law.length == 2).all()


def test_exact_law_pads_with_minus_one(peaked):
    law = exact_law(peaked.model, peaked.space)
    assert (law.length == (law.tokens >= 0).sum(1)).all()
    assert law.tokens.dtype == np.int32


def test_exact_law_refuses_what_it_cannot_do(peaked):
    with pytest.raises(ArgumentError, match=r"use powermc\.testing\.paths_of"):
        exact_law(peaked.model, Space(frozenset({2}), 3, EndsWith((0,))))
    with pytest.raises(ArgumentError, match="more than 5 paths"):
        exact_law(peaked.model, peaked.space, limit=5)


@given(toys.toys(max_paths=15), toys.temperatures())
def test_scores_are_logs_of_table_entries_and_normalisers(toy, temperature):
    e = 1 / temperature

    def program(path):
        return (yield toy.model.score(path, (e,)))

    for path in toy.paths:
        x = run(program(path))
        rows = [toy.model.table[toy.model.context(path.tokens[:t])] for t in range(len(path))]
        assert np.allclose(np.exp(x.log_p), [row[v] for row, v in zip(rows, path.tokens, strict=True)], rtol=1e-12)
        assert np.allclose(x.log_z[e], [np.log((row[row > 0] ** e).sum()) for row in rows], atol=1e-12)


def test_context_counts_missing_tokens_as_a_symbol_of_their_own():
    """order 2, V = 3: the empty prefix, one token and two tokens all have different rows."""
    model = TabularModel.random(0, vocab_size=3, order=2)
    prefixes = [p for n in range(3) for p in product(range(3), repeat=n)]
    assert len({model.context(p) for p in prefixes}) == len(prefixes) == 13
    assert model.context((2, 0, 1)) == model.context((0, 1))


def test_random_models_have_the_zeros_asked_for_and_no_empty_row():
    model = TabularModel.random(0, vocab_size=4, order=2, zeros=0.5)
    assert 0.2 < (model.table == 0).mean() < 0.5
    assert np.allclose(model.table.sum(1), 1)
    assert (TabularModel.random(0, vocab_size=4, order=1).table > 0).all()
    one, again = (TabularModel.random(3, vocab_size=3, order=1) for _ in range(2))
    assert (one.table == again.table).all()


@pytest.mark.parametrize(
    ("table", "order"),
    [
        (np.full((2, 2), 0.5), 1),
        (np.full((3, 2), 0.4), 1),
        (np.array([[1.5, -0.5]]), 0),
        (np.full(2, 0.5), 0),
        (np.full((1, 2), np.nan), 0),
    ],
)
def test_model_refuses_a_table_that_is_none(table, order):
    with pytest.raises(ArgumentError):
        TabularModel(table, order)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_extend_draws_from_the_tempered_row(peaked, temperature):
    """False positives 1e-6 over both cases; a bias of .05 in one token is found with 99%."""
    e = 1 / temperature
    row = peaked.model.table[peaked.model.start_context] ** e
    drawn = iter(range(1 << 30))

    def p_value(n):
        counts = np.zeros(3, dtype=np.int64)
        for _ in range(n):
            token = run(_extend(peaked.model, e, Stream(0, chain=next(drawn)).step(0)))
            counts[token.token] += 1
        return chi_square_p(counts, row / row.sum())

    assert sequential_test(p_value, n=5000, false_positives=5e-7).passed


def _extend(model, exponent, choices):
    from powermc.sequences import Path, Prompt

    return (yield model.branch(Path(Prompt(), (), False), 0).extend((exponent,), choices))

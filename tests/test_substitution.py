"""Substitution against its formula; exactness is shown in tests/exactness."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.sequences import Cut, Prompt, Space, Substitution, Without
from powermc.testing import EndsWith, enumerate_outcomes
from powermc.testing import strategies as toys
from powermc.toy import TabularModel


def proposed(toy, q, x):
    return enumerate_outcomes([lambda choices: q.propose(choices, x)])[0]


def law(toy, q, prefix):
    """q(. | prefix) off the table: p^(1/T) without end tokens, normalised; None if nothing is left."""
    weights = toy.model.table[toy.model.context(prefix)] ** (1 / q.temperature)
    weights[list(toy.space.eos)] = 0.0
    return weights / weights.sum() if weights.sum() > 0 else None


def by_formula(toy, q, x):
    """{(m, y): probability} of moves, and the probability of no move: m uniform, the block token by token."""
    n = sum(token not in toy.space.eos for token in x.tokens)
    if n == 0:
        return {}
    b = min(q.tokens, n)
    moves = {}
    for m in range(n - b + 1):
        blocks = {x.tokens[:m]: 1 / (n - b + 1)}
        current = 1.0
        for t in range(m, m + b):
            row = law(toy, q, x.tokens[:t])
            current *= 0.0 if row is None else row[x.tokens[t]]
            grown = {}
            for prefix, probability in blocks.items():
                row = law(toy, q, prefix)
                for v, p in enumerate([] if row is None else row):
                    grown[(*prefix, v)] = probability * p
            blocks = grown
        for prefix, probability in blocks.items():
            tokens = prefix + x.tokens[m + b :]
            if current > 0 and probability > 0 and toy.space.contains(tokens):
                moves[m, tokens] = probability
    return moves


@given(st.data())
@settings(max_examples=25)
def test_moves_and_their_probabilities(data):
    """Several end ids, stop rules, zeros; and log_hastings is the ratio of the probabilities both ways, per cut."""
    toy = data.draw(toys.toys())
    q = Substitution(toy.model, toy.space, data.draw(st.integers(1, 3)), data.draw(toys.temperatures()))
    expected = {x.tokens: by_formula(toy, q, x) for x in toy.paths}
    for x in toy.paths:
        found = {}
        for move, probability in proposed(toy, q, x):
            if not move.null:
                m = move.info["cut"]
                assert move.auxiliary == Cut(m, x.tokens[:m]) == Cut(m, move.value.tokens[:m])
                assert len(move.value) == len(x)
                found[m, move.value.tokens] = found.get((m, move.value.tokens), 0.0) + probability
                back = expected[move.value.tokens].get((m, x.tokens), 0.0)
                assert move.log_hastings == pytest.approx(math.log(back / found[m, move.value.tokens]), abs=1e-9)
        assert found == pytest.approx(expected[x.tokens], abs=1e-12)


@given(st.data())
@settings(max_examples=15)
def test_the_proposal_is_scored_on_block_and_prefix_only(data):
    """What is kept is scored by whoever needs it: the numbers that are there are those of a fresh pass."""
    toy = data.draw(toys.toys(max_paths=15))
    q = Substitution(toy.model, toy.space, data.draw(st.integers(1, 3)), 0.5)
    x = data.draw(st.sampled_from(toy.paths))
    for move, _ in proposed(toy, q, x):
        if not move.null:
            y, stop = move.value, move.info["cut"] + move.info["proposal_length"]
            assert y.evaluated((q.law,)) == y.evaluated() == stop
            assert y.finished == toy.space.ends(y.tokens)
            fresh = toy.model.answer([toy.model.score(toy.space.path(Prompt(), y.tokens), (q.law,))])[0]
            for a, b in [
                (y.log_p, fresh.log_p),
                (y.entropy, fresh.entropy),
                (y.margin, fresh.margin),
                (y.log_z[q.law], fresh.log_z[q.law]),
            ]:
                assert (a == b[:stop]).all()


def table(**rows):
    """Order 1 over three tokens; the last one ends."""
    return TabularModel(np.array([rows["after_0"], rows["after_1"], [0.2, 0.2, 0.6], rows["first"]]), 1)


def test_a_position_that_allows_only_the_end_is_no_move():
    """After 1 the model always ends: a block that comes by there stays, and nothing is proposed from within it."""
    model = table(first=[0.5, 0.5, 0.0], after_0=[0.3, 0.3, 0.4], after_1=[0.0, 0.0, 1.0])
    toy = toys.Toy(model, Space(frozenset({2}), 3))
    q = Substitution(model, toy.space, 2)
    moves = proposed(toy, q, toy.space.path(Prompt(), (0, 0, 2)))
    stayed = [(move, p) for move, p in moves if move.null]
    assert sum(p for _, p in stayed) == pytest.approx(0.5)
    assert [(move.info["proposal_length"], move.info["outside"]) for move, _ in stayed] == [(1, False)]
    ((move, _),) = proposed(toy, q, toy.space.path(Prompt(), (1, 0, 2)))
    assert move.null
    assert "proposal_length" not in move.info


def test_a_path_of_an_end_alone_has_no_move(peaked):
    ((move, p),) = proposed(peaked, Substitution(peaked.model, peaked.space, 2), peaked.space.path(Prompt(), (2,)))
    assert (move.null, p, move.info) == (True, 1.0, {})


def test_a_stop_rule_is_the_only_test(peaked):
    """(0, 1) stops: a block that makes it stop earlier, or no longer, leaves the space and is counted."""
    toy = replace(peaked, space=Space(frozenset({2}), 3, EndsWith((0, 1))))
    q = Substitution(toy.model, toy.space, 1)
    moves = proposed(toy, q, toy.space.path(Prompt(), (0, 1)))
    outside = {move.info["cut"] for move, _ in moves if move.info.get("outside")}
    assert outside == {0, 1}
    assert {move.value.tokens for move, _ in moves if not move.null} == {(0, 1)}
    assert all(move.null and move.value == move.origin for move, _ in moves if move.info.get("outside"))
    moves = proposed(toy, q, toy.space.path(Prompt(), (0, 0, 1)))
    assert {move.value.tokens for move, _ in moves if not move.null} == {(0, 0, 1), (1, 0, 1), (0, 0, 0)}


def test_no_end_ids_and_blocks_longer_than_the_path(peaked):
    toy = replace(peaked, space=Space(frozenset(), 2))
    q = Substitution(toy.model, toy.space, 9)
    assert q.law == Without(1.0, frozenset())
    moves = proposed(toy, q, toy.space.path(Prompt(), (0, 2)))
    assert {move.info["proposal_length"] for move, _ in moves} == {2}
    assert sum(p for move, p in moves if not move.null) == pytest.approx(1.0)


@pytest.mark.parametrize("tokens", [0, -1])
def test_at_least_one_token(tokens, peaked):
    with pytest.raises(ArgumentError, match=f"a substitution redraws at least 1 token, got {tokens}"):
        Substitution(peaked.model, peaked.space, tokens)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature(temperature, peaked):
    with pytest.raises(ArgumentError, match="temperature must be a finite number > 0"):
        Substitution(peaked.model, peaked.space, 1, temperature)

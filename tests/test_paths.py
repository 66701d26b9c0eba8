"""Paths and spaces: absorbing ends, stop rules, and a listing that leaves nothing out."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc.errors import ArgumentError
from powermc.sequences import Path, Prompt, Space
from powermc.sequences.path import agreement
from powermc.testing import EndsWith, paths_of, prefixes_of
from powermc.testing import strategies as toys

anyspace = st.tuples(st.integers(3, 4), st.integers(1, 3)).flatmap(
    lambda size: st.tuples(toys.spaces(size[0], horizon=size[1]), st.just(size[0]))
)


@given(anyspace)
def test_paths_of_lists_exactly_the_members(case):
    """Against `contains` on every string of every length: would catch a lost, doubled or overlong path."""
    space, vocab_size = case
    strings = [s for n in range(space.horizon + 2) for s in product(range(vocab_size), repeat=n)]
    assert [p.tokens for p in paths_of(space, vocab_size)] == sorted(s for s in strings if space.contains(s))


@given(anyspace)
def test_paths_stop_at_their_first_end_and_nowhere_else(case):
    """The definition, written the long way round: no proper prefix ends, and the whole ends or fills the horizon."""
    space, vocab_size = case
    for path in paths_of(space, vocab_size):
        ends = [
            t
            for t in range(1, len(path) + 1)
            if path.tokens[t - 1] in space.eos or (space.stop is not None and space.stop(path.tokens[:t]))
        ]
        assert ends in ([], [len(path)])
        assert path.finished == bool(ends)
        assert path.finished or len(path) == space.horizon


@given(anyspace)
def test_prefixes_are_those_of_the_paths(case):
    space, vocab_size = case
    expected = {p.tokens[:t] for p in paths_of(space, vocab_size) for t in range(len(p))}
    found = prefixes_of(space, vocab_size)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_end_at_the_horizon_and_no_end_are_different_paths():
    space = Space(frozenset({2}), 2)
    ended, cut = space.path(Prompt(), [0, 2]), space.path(Prompt(), [0, 1])
    assert ended.finished
    assert not cut.finished
    assert len(paths_of(space, 3)) == 7


def test_a_stop_rule_absorbs_like_an_end_id():
    space = Space(frozenset({3}), 3, EndsWith((0, 1)))
    assert space.contains((0, 1))
    assert not space.contains((0, 1, 2))
    assert not space.contains((2, 0))
    assert space.contains((2, 0, 1))
    assert space.path(Prompt(), (2, 0, 1)).finished


@pytest.mark.parametrize("tokens", [(), (0,), (2, 0), (0, 0, 0), (0, 2, 0)])
def test_path_refuses_tokens_that_are_no_path(tokens):
    with pytest.raises(ArgumentError, match="are not a path"):
        Space(frozenset({2}), 2).path(Prompt(), tokens)


def test_an_end_id_in_the_prompt_ends_nothing():
    """Seen in the wild: EOS searched in prompt + output."""
    assert Space(frozenset({2}), 2).path(Prompt((2, 2)), (0, 2)).tokens == (0, 2)


def test_space_refuses_a_horizon_below_one():
    with pytest.raises(ArgumentError, match="at least 1 token"):
        Space(frozenset(), 0)


def test_paths_are_equal_by_prompt_and_tokens_alone():
    """A scored path is the same value: `changed` and the rows of P depend on it."""
    a = Path(Prompt((1,)), (0, 2), True)
    scored = a.with_scores("model", np.zeros(2), np.zeros(2), np.zeros(2), {1.0: np.zeros(2)}, None)
    assert a == scored
    assert hash(a) == hash(scored)
    assert a != Path(Prompt((2,)), (0, 2), True)
    assert a != Path(Prompt((1,)), (0, 1), True)
    assert a != (0, 2)


def test_with_scores_keeps_what_was_known_and_leaves_the_path_alone():
    """Aliasing would let a rejected evaluation change the current state."""
    a = Path(Prompt(), (0, 2), True).with_scores(
        "model", np.zeros(2), np.zeros(2), np.zeros(2), {1.0: np.zeros(2)}, None
    )
    b = a.with_scores("model", np.ones(2), np.ones(2), np.ones(2), {4.0: np.ones(2)}, "cache")
    assert set(b.log_z) == {1.0, 4.0}
    assert set(a.log_z) == {1.0}
    assert (a.log_prob, b.log_prob) == (0.0, 2.0)
    assert b.scored("model", (1.0, 4.0))
    assert not a.scored("model", (4.0,))
    assert a.scored("model")
    with pytest.raises(TypeError):
        b.log_z[2.0] = np.ones(2)  # type: ignore[index]


def scored_by(path, model, value, exponent=1.0):
    return path.with_scores(
        model, np.full(2, value), np.full(2, value), np.full(2, value), {exponent: np.full(2, value)}, f"cache {value}"
    )


def test_scores_of_several_models_are_kept_apart():
    """Each model sees its own scores and no other's, in whatever order they were found and asked for."""
    models = [object(), object(), object()]
    path = Path(Prompt((1,)), (0, 2), True)
    for i in (0, 1, 2, 0):
        path = scored_by(path, models[i], float(i), exponent=1.0 if len(path.others) < 2 else 4.0)
    for order in permutations(range(3)):
        for i in order:
            view = path.view(models[i])
            assert view is not None
            assert view.log_prob == 2.0 * i
            assert set(view.log_z) == ({1.0, 4.0} if i == 0 else {1.0})
            assert view.cache == f"cache {float(i)}"
            assert view == path
            assert path.scored(models[i], (1.0,))
            assert path.scored(models[i], (4.0,)) == (i == 0)
            path = view
    assert path.view(object()) is None
    assert not path.scored(object())
    assert len(path.others) == 2


def test_a_path_that_nobody_scored_has_no_view():
    assert Path(Prompt(), (0,), False).view(object()) is None
    assert not Path(Prompt(), (0,), False).scored(object())


def test_an_unscored_path_has_no_probability_to_give():
    with pytest.raises(ArgumentError, match="not been scored"):
        _ = Path(Prompt(), (0,), False).log_prob


@given(st.lists(st.integers(0, 2), max_size=6).map(tuple), st.lists(st.integers(0, 2), max_size=6).map(tuple))
def test_how_far_two_paths_agree(a, b):
    """By its definition: the longest beginning of one that the other begins with."""
    assert agreement(a, b) == max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n]) == agreement(b, a)

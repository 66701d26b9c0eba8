"""The suffix proposal: its law, its Hastings term and its null moves, against formulas written from the table alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.choices import Stream
from powermc.errors import ArgumentError
from powermc.kernels import Metropolis, Mixture
from powermc.proposals import Independent
from powermc.scheduling import run
from powermc.sequences import (
    Entropy,
    Horizon,
    Length,
    Prompt,
    SequenceProbability,
    Space,
    Suffix,
    default_temperature,
    draft,
)
from powermc.targets import Power, Table
from powermc.testing import enumerate_kernel, enumerate_outcomes, prove
from powermc.testing import strategies as toys
from powermc.toy import TabularModel


def cut_probability(toy, law, m, x):
    """C(m | x) from the definition of each law."""
    if isinstance(law, Horizon):
        return (law.start <= m < law.stop) / (law.stop - law.start)
    if isinstance(law, Length):
        return (law.start <= m < len(x)) / (len(x) - law.start) if len(x) > law.start else 0.0
    rows = [toy.model.table[toy.model.context(x.tokens[:t])] for t in range(len(x))]
    h = [-sum(v * math.log(v) for v in row if v > 0) if t >= law.start else 0.0 for t, row in enumerate(rows)]
    return h[m] / sum(h) if m < len(x) and sum(h) > 0 else 0.0


def tail_probability(toy, m, x, temperature):
    """prod_{t >= m} of the tempered, normalised rows."""
    q = 1.0
    for t in range(m, len(x)):
        row = toy.model.table[toy.model.context(x.tokens[:t])] ** (1 / temperature)
        q *= row[x.tokens[t]] / row.sum()
    return q


def matrix_by_formula(toy, alpha, law, temperature):
    """P_ij = sum_m C(m | i) q(j | i_<m) min(1, r_m), the rest of each row on the diagonal."""
    support = [i for i, p in enumerate(toy.p) if p > 0]
    pi = toy.power(alpha)
    matrix = np.zeros((len(support), len(support)))
    for a, i in enumerate(support):
        for b, j in enumerate(support):
            x, y = toy.paths[i], toy.paths[j]
            for m in range(min(len(x), len(y))):
                if x.tokens[:m] != y.tokens[:m] or a == b:
                    continue
                forward = cut_probability(toy, law, m, x) * tail_probability(toy, m, y, temperature)
                back = cut_probability(toy, law, m, y) * tail_probability(toy, m, x, temperature)
                if forward > 0:
                    matrix[a, b] += forward * min(1.0, pi[j] * back / (pi[i] * forward))
        matrix[a, a] = 1 - matrix[a].sum()
    return matrix


@given(st.data())
def test_the_transition_matrix_is_the_one_on_paper(data):
    """Entry by entry, so also faults that keep pi invariant: a tail drawn at the wrong temperature or from a wrong
    prefix with its ratio to match, a cut law other than the one named."""
    toy = data.draw(toys.toys(max_paths=15))
    law = data.draw(toys.cut_laws(toy.space.horizon, start=True))
    alpha, temperature = data.draw(toys.alphas()), data.draw(toys.temperatures())
    found = enumerate_kernel(toy.metropolis(alpha, law, temperature), toy.paths)
    assert np.allclose(found.matrix, matrix_by_formula(toy, alpha, law, temperature), rtol=1e-9, atol=1e-13)


@given(st.data())
def test_the_hastings_term_is_the_ratio_of_enumerated_proposals(data):
    """log q(x | y) - log q(y | x) per cut, each q counted from the production draws."""
    toy = data.draw(toys.toys(max_paths=13))
    q = data.draw(toys.suffixes(toy, start=True))
    supported = [x for x, p in zip(toy.paths, toy.p, strict=True) if p > 0]
    leaves = enumerate_outcomes([lambda choices, x=x: q.propose(choices, x) for x in supported])
    flow, hastings = {}, {}
    for x, outcomes in zip(supported, leaves, strict=True):
        for move, probability in outcomes:
            if not move.null:
                key = (x, move.value, move.info["cut"])
                flow[key] = flow.get(key, 0.0) + probability
                hastings[key] = move.log_hastings
    for (x, y, m), forward in flow.items():
        assert hastings[x, y, m] == pytest.approx(math.log(flow[y, x, m] / forward), abs=1e-9)


@given(st.data())
def test_a_drafted_path_knows_what_a_scored_one_does(data):
    """Kept head and fresh tail joined at the cut: catches scores shifted by one, or taken from the old tail."""
    toy = data.draw(toys.toys(max_paths=15))
    q = data.draw(toys.suffixes(toy))
    e = 1 / q.temperature
    x = data.draw(st.sampled_from([x for x, p in zip(toy.paths, toy.p, strict=True) if p > 0]))
    for move, _ in enumerate_outcomes([lambda choices: q.propose(choices, x)])[0]:
        if not move.null:
            assert toy.space.contains(move.value.tokens)
            fresh = run(_scored(toy.model, toy.space.path(x.prompt, move.value.tokens), e))
            assert move.value.finished == fresh.finished
            for a, b in [
                (move.value.log_p, fresh.log_p),
                (move.value.entropy, fresh.entropy),
                (move.value.log_z[e], fresh.log_z[e]),
            ]:
                assert (a == b).all()
            m = move.info["cut"]
            assert move.value.tokens[:m] == x.tokens[:m]
            assert move.info["proposal_length"] == move.info["tokens"] == len(move.value) - m


def _scored(model, path, exponent):
    return (yield model.score(path, (exponent,)))


def test_cuts_past_the_end_are_null_moves_and_are_counted(peaked):
    """`horizon` on a path of one token: two thirds of the cuts lie past its end."""
    q = peaked.suffix(Horizon(3))
    outcomes = enumerate_outcomes([lambda choices: q.propose(choices, peaked.space.path(Prompt(), (2,)))])[0]
    null = [(move, p) for move, p in outcomes if move.null]
    assert sum(p for _, p in null) == pytest.approx(2 / 3)
    assert {move.info["cut"] for move, _ in null} == {1, 2}


def test_a_frozen_path_has_no_move(peaked):
    q = peaked.suffix(Length(1))
    ((move, p),) = enumerate_outcomes([lambda choices: q.propose(choices, peaked.space.path(Prompt(), (2,)))])[0]
    assert move.null
    assert p == 1.0


@given(st.data())
@settings(max_examples=15)
def test_a_tail_that_q_could_not_draw_stays_and_a_mixture_repairs_it(data):
    """Target of full support, q with zeros: exact on its own but not irreducible, which a mixture with a proposal of
    full support repairs. Proposing from such a path all the same would give a log ratio of -inf or NaN: no way back."""
    toy = data.draw(toys.toys(max_paths=15))
    target = Table({x: -0.3 * i for i, x in enumerate(toy.paths)})
    narrow = Metropolis(target, data.draw(toys.suffixes(toy)))
    found = prove(narrow, toy.paths, irreducible=False)
    for x, p, leaves in zip(toy.paths, toy.p, found.leaves, strict=True):
        if p == 0:
            impossible = max(t for t in range(len(x)) if tail_probability(toy, t, x, 1.0) == 0)
            assert all(info["null"] for (_, info), _ in leaves if info.get("cut", -1) <= impossible)
    anywhere = Metropolis(target, Independent(dict.fromkeys(toy.paths, 0.0)))
    prove(Mixture([narrow, anywhere], [0.9, 0.1]), toy.paths)


def test_proposals_from_two_models_in_one_mixture(peaked):
    """Each model scores the path anew rather than take the other's log p and log Z for its own."""
    other = replace(peaked, model=TabularModel.random(0, vocab_size=3, order=1))
    target = Table({x: -0.3 * i for i, x in enumerate(peaked.paths)})
    prove(Mixture([Metropolis(target, toy.suffix()) for toy in (peaked, other)], [0.5, 0.5]), peaked.paths)


def test_proposals_from_another_model_than_the_target(peaked):
    """The target p^alpha is that of its own model, whichever model drew the path."""
    other = replace(peaked, model=TabularModel.random(0, vocab_size=3, order=1))
    target = Power(SequenceProbability(peaked.model), 2.0)
    found = prove(Metropolis(target, other.suffix()), peaked.paths)
    own = enumerate_kernel(peaked.metropolis(2.0), peaked.paths)
    assert np.abs(found.pi - own.pi).max() < 1e-12
    assert np.abs(found.matrix - own.matrix).max() > 0.01


def test_draft_names_every_position_its_own_stream(peaked):
    """Two drafts that share a prefix draw the same token where their streams and prefixes agree: tokens depend on
    (purpose, position), not on how many draws came before."""
    x = run(_scored(peaked.model, peaked.space.path(Prompt(), (0, 1, 1)), 1.0))
    for chain in range(20):
        choices = Stream(0, chain=chain).step(0)
        whole, ran, _ = run(draft(peaked.model, peaked.space, x, 0, 1.0, choices))
        again, ran_again, _ = run(draft(peaked.model, peaked.space, whole, min(1, len(whole) - 1), 1.0, choices))
        assert again.tokens == whole.tokens
        assert (ran, ran_again) == (len(whole), len(whole) - min(1, len(whole) - 1))


def test_near_ties_are_draws_closer_to_a_boundary_than_the_model_resolves(peaked):
    """A tabular draw has slack 1, so a resolution above it makes every draw a near-tie, and 0 none."""
    for resolution, expected in [(0.0, False), (2.0, True)]:
        q = Suffix(replace(peaked.model, resolution=resolution), peaked.space, Length(), 1.0)
        move = run(q.propose(Stream(0).step(0), peaked.paths[0]))
        assert move.info["near_ties"] == (move.info["proposal_length"] if expected else 0)


@dataclass(frozen=True)
class CountedRows(TabularModel):
    """Counts rows opened and released."""

    def branch(self, path, cut):
        self.open.append(1)  # type: ignore[attr-defined]
        row = super().branch(path, cut)
        model = self

        class Row(type(row)):
            __slots__ = ()

            def release(self):
                model.open.pop()  # type: ignore[attr-defined]

        return Row(row.model, row.context)


def test_draft_releases_its_row_also_when_it_is_closed(peaked):
    """A leaked row is memory that no later chain gets."""
    model = CountedRows(peaked.model.table, peaked.model.order)
    object.__setattr__(model, "open", [])
    x = run(_scored(model, peaked.paths[0], 1.0))
    run(draft(model, peaked.space, x, 0, 1.0, Stream(0)))
    assert model.open == []  # type: ignore[attr-defined]
    started = draft(model, peaked.space, x, 0, 1.0, Stream(0))
    next(started)
    assert model.open == [1]  # type: ignore[attr-defined]
    started.close()
    assert model.open == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_suffix_refuses_a_temperature_out_of_range(peaked, temperature):
    with pytest.raises(ArgumentError, match="temperature must be a finite number > 0"):
        Suffix(peaked.model, peaked.space, Length(), temperature)


@pytest.mark.parametrize(("alpha", "expected"), [(4.0, 0.25), (1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (2.0, 0.5)])
def test_the_default_temperature_is_the_smaller_of_1_and_1_over_alpha(alpha, expected):
    assert default_temperature(alpha) == expected


def test_entropy_law_and_temperature_are_independent_of_alpha():
    """alpha 4 with q at T = 2 and entropy cuts, on several end ids and a stop rule: nothing assumes T = 1 / alpha."""
    model = TabularModel.random(0, vocab_size=4, order=1, concentration=0.3, zeros=0.2)
    space = Space(frozenset({1, 3}), 3, lambda tokens: tokens[-2:] == (0, 2))
    toy = toys.Toy(model, space)
    prove(toy.metropolis(4.0, Entropy(), 2.0), toy.paths, law=toy.power(4.0))


def test_the_null_move_of_a_rescored_path_keeps_its_scores(peaked):
    """`origin` carries what was evaluated, so that the next step does not ask again."""
    kernel = Metropolis(Table(dict.fromkeys(peaked.paths, 0.0)), peaked.suffix(Horizon(3), 0.5))
    found = enumerate_kernel(kernel, peaked.paths)
    impossible = next(i for i, x in enumerate(found.values) if x.tokens == (1, 1, 0))
    stayed = [leaf.value for leaf in found.leaves[impossible] if leaf.value[1]["null"]]
    assert [info["cut"] for _, info in stayed] == [0, 1]
    assert all(state.value.scored(peaked.model, (2.0,)) for state, _ in stayed)


def test_a_cut_past_the_end_costs_nothing(peaked):
    """A law that looks at the length alone is drawn from before the model is asked anything."""
    kernel = Metropolis(Table(dict.fromkeys(peaked.paths, 0.0)), peaked.suffix(Horizon(3), 0.5))
    found = enumerate_kernel(kernel, [peaked.space.path(Prompt(), (2,)), *peaked.paths[:-1]])
    stayed = [leaf.value for leaf in found.leaves[0] if leaf.value[1]["null"]]
    assert [info["cut"] for _, info in stayed] == [1, 2]
    assert all(state.value.log_p is None for state, _ in stayed)

"""Every kernel, cut law and composition proved by enumeration on models that hypothesis draws.

`prove` asserts: rows sum to 1, pi P = pi to 1e-12, irreducible, reversible where claimed, and P_2 = P P with the state
carried over. Each test also names the law it means, so that a target with a wrong exponent fails as well.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.kernels import Cycle, Metropolis, Mixture
from powermc.proposals import Independent, RandomWalk
from powermc.sequences import BlockwisePower, Length, SequenceProbability, Space, cut_law
from powermc.targets import Power, Product, Table, Tempered, Tilted
from powermc.testing import assert_irreducible, assert_same_kernel, enumerate_kernel, prove
from powermc.testing import strategies as toys
from powermc.types import State

VALUES = ("a", "b", "c", "d", "e")


# Paths


@pytest.mark.parametrize("law", ["length", "horizon", "entropy"])
@given(data=st.data())
@settings(max_examples=25)
def test_suffix_metropolis(law, data):
    """Each cut law at every alpha (0 and .5 too) and temperature, with several end ids and stop rules."""
    toy = data.draw(toys.toys())
    cuts = cut_law(law, start=0, horizon=toy.space.horizon, block_size=1)
    alpha, temperature = data.draw(toys.alphas()), data.draw(toys.temperatures())
    prove(toy.metropolis(alpha, cuts, temperature), toy.paths, law=toy.power(alpha))


@given(st.data())
def test_cut_laws_that_freeze_a_prefix(data):
    """`block`, and any law from a later start: pi is still invariant on the whole space, though not reached."""
    toy = data.draw(toys.toys(max_paths=15))
    kernel = Metropolis(data.draw(toys.path_targets(toy)), data.draw(toys.suffixes(toy, start=True)))
    prove(kernel, toy.paths, irreducible=False)


@given(st.data())
def test_any_target_and_composition(data):
    """Powers, rewards (some -inf), products, bridges; mixtures (nested too) and cycles of any suffix proposals."""
    toy = data.draw(toys.toys(max_paths=15))
    target = data.draw(toys.path_targets(toy))
    kernel, reversible = data.draw(toys.kernels(toy, target, cycle=len(toy.paths) < 10))
    prove(kernel, toy.paths, reversible=reversible)


@given(st.data())
@settings(max_examples=25)
def test_reward_tilted_power(data):
    """The law of Tilted, Product and Tempered on paths, computed without them."""
    toy = data.draw(toys.toys(max_paths=15))
    reward = data.draw(toys.rewards(toy))
    alpha, beta = data.draw(toys.alphas()), data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    r = np.exp([reward.log_weights[x] for x in toy.paths])
    p = SequenceProbability(toy.model)
    cases = [
        (Tilted(Power(p, alpha), reward.log_density), toy.power(alpha) * r),
        (Product((Power(p, alpha), reward)), toy.power(alpha) * r),
        (Tempered(Power(p, alpha), reward, beta), toy.power(alpha * (1 - beta)) * np.where(r > 0, r**beta, 0.0)),
    ]
    for target, law in cases:
        prove(Metropolis(target, toy.suffix(temperature=0.5)), toy.paths, law=law, carried=False)


@given(st.data())
@settings(max_examples=15)
def test_two_temperatures_in_one_mixture(data):
    """Each component needs log Z at its own exponent: a path drafted at one temperature is completed for the other,
    and the completed path is kept when the move is rejected (`Move.origin`)."""
    toy = data.draw(toys.toys(max_paths=13))
    a, b = data.draw(st.lists(toys.temperatures(), min_size=2, max_size=2, unique=True))
    alpha = data.draw(toys.alphas())
    found = prove(
        Mixture([toy.metropolis(alpha, temperature=a), toy.metropolis(alpha, temperature=b)], [0.5, 0.5]),
        toy.paths,
        law=toy.power(alpha),
    )
    for x, leaves in zip(found.values, found.leaves, strict=True):
        for (state, info), _ in leaves:
            exponent = 1 / (a, b)[info["component"]]
            assert state.value.scored(state.value.by, (exponent,))
            if state.value == x and not info["accepted"]:
                assert state.log_density == found.states[found.values.index(x)].log_density


@given(st.data())
@settings(max_examples=10)
def test_two_models(data):
    """A product of experts and a bridge between them, with proposals from both: whose log p and log Z a path holds is
    never mixed up, the state carried over."""
    one = data.draw(toys.toys(max_paths=7))
    other = toys.Toy(data.draw(toys.models(one.space, one.model.vocab_size)), one.space)
    a, b = data.draw(toys.alphas()), data.draw(toys.alphas())
    if not ((one.p > 0) & (other.p > 0)).any():
        return
    p, q = (Power(SequenceProbability(toy.model), e) for toy, e in ((one, a), (other, b)))
    proposals = [data.draw(toys.suffixes(toy)) for toy in (one, other)]
    for target, law in [
        (Product((p, q)), one.power(a) * other.power(b)),
        (Tempered(p, q, 0.3), one.power(0.7 * a) * other.power(0.3 * b)),
    ]:
        # Not irreducible where neither proposal can cross what the other model forbids.
        prove(Mixture([Metropolis(target, r) for r in proposals], [0.5, 0.5]), one.paths, law=law, irreducible=False)


@given(st.data())
@settings(max_examples=4)
def test_compositions_are_sums_and_products_of_matrices(data):
    """Mixture = sum of w_i P_i and Cycle = P_1 P_2, nested ones included. Catches weights that are not normalised,
    components run in the wrong order, and numbers shared between components."""
    toy = data.draw(toys.toys(max_paths=7))
    parts = [
        toy.metropolis(2.0, q.cuts, q.temperature)
        for q in data.draw(st.lists(toys.suffixes(toy), min_size=2, max_size=2))
    ]
    p, q = (enumerate_kernel(kernel, toy.paths).matrix for kernel in parts)
    mixture = Mixture(parts, [3.0, 1.0])
    for kernel, matrix in [
        (mixture, 0.75 * p + 0.25 * q),
        (Mixture([mixture, parts[0]], [0.5, 0.5]), 0.875 * p + 0.125 * q),
        (Mixture(parts, [0.0, 2.0]), q),
        (Cycle(parts), p @ q),
        (Cycle([mixture, parts[1]]), (0.75 * p + 0.25 * q) @ q),
        (Mixture([Cycle(parts), parts[0]], [0.5, 0.5]), 0.5 * p @ q + 0.5 * p),
        (Cycle([Cycle([parts[0]]), parts[1]]), p @ q),
    ]:
        assert np.allclose(enumerate_kernel(kernel, toy.paths).matrix, matrix, rtol=0, atol=1e-12)


@given(st.data())
@settings(max_examples=10)
def test_cycles(data):
    """Invariant though not reversible; and a cycle really is not, or `reversible=False` would hide nothing."""
    toy = data.draw(toys.toys(max_paths=7))
    cycle = Cycle(
        [
            toy.metropolis(4.0, q.cuts, q.temperature)
            for q in data.draw(st.lists(toys.suffixes(toy), min_size=1, max_size=2))
        ]
    )
    prove(cycle, toy.paths, reversible=len(cycle.kernels) == 1, law=toy.power(4.0))


def test_a_cycle_is_not_reversible(peaked):
    cycle = Cycle(
        [peaked.metropolis(4.0), peaked.metropolis(4.0, cut_law("horizon", start=2, horizon=3, block_size=1))]
    )
    with pytest.raises(AssertionError, match="is unbalanced"):
        prove(cycle, peaked.paths, carried=False)


# scope="block"


def stages(toy, data, alpha):
    growth = BlockwisePower(
        toy.model,
        toy.space,
        alpha=alpha,
        temperature=data.draw(toys.temperatures()),
        block_size=data.draw(st.integers(1, 2)),
        scope="block",
        cut=data.draw(st.sampled_from(["length", "horizon", "block", "entropy"])),
    )
    return [growth.stage(block) for block in range(growth.blocks)]


@given(st.data())
def test_block_scope_is_exact_given_the_prefix(data):
    """The kernel of block k, on the paths that share their first k B tokens: invariant and irreducible for p^alpha
    restricted to them. Nothing leaves such a class, and a path that has ended is alone in its own."""
    toy = data.draw(toys.toys(max_paths=15))
    alpha = data.draw(toys.alphas())
    for stage in stages(toy, data, alpha):
        part = toys.Toy(toy.model, stage.space)
        classes: dict = {}
        for path, weight, p in zip(part.paths, part.power(alpha), part.p, strict=True):
            classes.setdefault(path.tokens[: stage.kernel.proposal.cuts.start], []).append((path, weight, p))
        for members in classes.values():
            if any(p > 0 for *_, p in members):
                paths, law, _ = zip(*members, strict=True)
                prove(stage.kernel, paths, law=law, carried=len(paths) < 8)


def limit_law(toy, growth):
    """Where blockwise growth ends with infinitely many steps per block: each block at its own stationary law."""
    law = {(): 1.0}
    for block in range(growth.blocks):
        stage = growth.stage(block)
        part = toys.Toy(toy.model, stage.space)
        pi = part.power(growth.alpha)
        start = stage.kernel.proposal.cuts.start
        grown = {}
        for prefix, mass in law.items():
            inside = [i for i, x in enumerate(part.paths) if x.tokens[:start] == prefix]
            total = sum(pi[i] for i in inside)
            grown.update({part.paths[i].tokens: mass * pi[i] / total for i in inside if pi[i] > 0})
        law = grown
    return np.array([law.get(x.tokens, 0.0) for x in toy.paths])


def test_block_scope_is_not_the_joint(peaked):
    """With blocks of one token the limit is sampling token by token from p^alpha / Z: .1 and more from p^alpha of the
    whole. If this fails, the warning in the documentation is wrong. `sequence` has no such gap: it is the joint."""
    joint = peaked.power(4.0)
    block = BlockwisePower(peaked.model, peaked.space, alpha=4.0, block_size=1, scope="block")
    assert np.abs(limit_law(peaked, block) - joint).sum() / 2 > 0.1
    whole = BlockwisePower(peaked.model, peaked.space, alpha=4.0, block_size=1, scope="sequence")
    prove(whole.stage(whole.blocks - 1).kernel, peaked.paths, law=joint)
    with pytest.raises(AssertionError, match="falls into"):
        assert_irreducible(block.stage(block.blocks - 1).kernel, peaked.paths)


def test_block_scope_samples_what_limit_law_says(peaked):
    """The claim above by the production kernels: P_k to the power 60, stage after stage."""
    growth = BlockwisePower(peaked.model, peaked.space, alpha=4.0, block_size=1, scope="block")
    law = {(): 1.0}
    for block in range(growth.blocks):
        stage = growth.stage(block)
        part = toys.Toy(peaked.model, stage.space)
        found = enumerate_kernel(stage.kernel, part.paths)
        begin = np.zeros(len(found.values))
        for i, x in enumerate(found.values):
            prefix = x.tokens[: stage.kernel.proposal.cuts.start]
            first = next(y for y in found.values if y.tokens[: len(prefix)] == prefix)
            begin[i] = law.get(prefix, 0.0) if x == first else 0.0
        end = begin @ np.linalg.matrix_power(found.matrix, 4000)
        law = {x.tokens: float(v) for x, v in zip(found.values, end, strict=True)}
    expected = limit_law(peaked, growth)
    assert np.allclose([law.get(x.tokens, 0.0) for x in peaked.paths], expected, atol=1e-6)


# Spaces that are no sequences


@given(st.data())
def test_plain_kernels(data):
    """Random walks on uneven graphs and independence samplers on every kind of target: the kernels know no tokens."""
    target = data.draw(toys.plain_targets(VALUES))
    if not any(target.log_density(v) > -np.inf for v in VALUES):
        return
    kernel, reversible = data.draw(toys.plain_kernels(VALUES, target))
    prove(kernel, VALUES, reversible=reversible)


@given(toys.plain_targets(VALUES), toys.graphs(VALUES))
def test_a_random_walk_is_irreducible_exactly_if_its_graph_connects_the_support(target, graph):
    """Both ways round, so that `assert_irreducible` is tested too."""
    support = [v for v in VALUES if target.log_density(v) > -np.inf]
    kernel = Metropolis(target, RandomWalk(graph))
    found = prove(kernel, VALUES, irreducible=False)
    assert found.values == support
    if graph.connects(support):
        assert_irreducible(found)
    else:
        with pytest.raises(AssertionError, match="falls into"):
            assert_irreducible(found)


@given(toys.tables(VALUES), toys.tables(VALUES, zeros=False), toys.alphas(), st.sampled_from([0.0, 0.4, 1.0]))
def test_plain_targets_have_the_law_of_their_formula(table, other, alpha, beta):
    anywhere = Independent(dict.fromkeys(VALUES, 0.0))
    t, o = (np.array([x.log_weights[v] for v in VALUES]) for x in (table, other))
    for target, log_law in [
        (Power(table, alpha), np.where(t > -np.inf, alpha * np.maximum(t, -1e4), -np.inf)),
        (Tilted(table, other.log_density), t + o),
        (Product((table, other, other)), t + 2 * o),
        (Tempered(other, table, beta), np.where(t > -np.inf, (1 - beta) * o + beta * np.maximum(t, -1e4), -np.inf)),
    ]:
        law = np.exp(log_law - log_law.max())
        prove(Metropolis(target, anywhere), VALUES, law=law, carried=False)


def test_metropolis_by_hand():
    """Three values, a path graph: the matrix written out."""
    target = Table({0: 0.0, 1: np.log(2.0), 2: np.log(4.0)})
    graph = {0: [1], 1: [0, 2], 2: [1]}
    found = enumerate_kernel(Metropolis(target, RandomWalk(graph.__getitem__)), range(3))
    assert np.allclose(found.matrix, [[0, 1, 0], [0.5, 0, 0.5], [0, 0.25, 0.75]], atol=1e-15)
    assert np.allclose(found.pi, [1 / 7, 2 / 7, 4 / 7])
    loop = {0: [1, 2], 1: [0, 2], 2: [1, 0]}
    found = enumerate_kernel(Metropolis(target, RandomWalk(loop.__getitem__)), range(3))
    expected = [[0, 0.5, 0.5], [0.25, 0.25, 0.5], [0.125, 0.25, 0.625]]
    assert np.allclose(found.matrix, expected, atol=1e-15)


def test_a_proposal_of_impossible_values_is_rejected():
    """log pi(y) = -inf with any Hastings term, +inf too (NaN): stay."""
    target = Table({0: 0.0, 1: 0.0})
    kernel = Metropolis(target, RandomWalk(lambda v: [0, 1, 2]))
    assert np.allclose(enumerate_kernel(kernel, range(3)).matrix, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])


@given(st.data())
@settings(max_examples=10)
def test_infos_hold_what_the_kernel_declares(data):
    """Names and castable values: a store allocates its arrays from `fields`."""
    toy = data.draw(toys.toys(max_paths=7))
    kernel, _ = data.draw(toys.kernels(toy, data.draw(toys.path_targets(toy))))
    for leaves in enumerate_kernel(kernel, toy.paths).leaves:
        for (state, info), _ in leaves:
            assert isinstance(state, State)
            assert info.keys() <= kernel.fields.keys()
            for name, value in info.items():
                np.array(value).astype(kernel.fields[name].dtype, casting="same_kind")


@given(st.data())
@settings(max_examples=15)
def test_changed_counts_accepted_moves_that_moved(data):
    """Accepted moves to the same path flatter the acceptance rate; `changed` must leave them out."""
    toy = data.draw(toys.toys(max_paths=15))
    found = enumerate_kernel(toy.metropolis(2.0, Length(), 0.5), toy.paths)
    for x, leaves in zip(found.values, found.leaves, strict=True):
        for (state, info), _ in leaves:
            assert info["changed"] == (state.value != x)
            assert info["accepted"] >= info["changed"]


def test_a_cycle_changed_if_any_part_did(peaked):
    """The last part alone would hide the others' moves. The second part freezes all but the last token."""
    last = cut_law("horizon", start=2, horizon=3, block_size=1)
    found = enumerate_kernel(Cycle([peaked.metropolis(2.0), peaked.metropolis(2.0, last)]), peaked.paths)
    infos = [info for leaves in found.leaves for (_, info), _ in leaves]
    for name in ("accepted", "changed"):
        assert all(info[name] == (info[f"{name}_0"] or info[f"{name}_1"]) for info in infos)
        assert {(info[f"{name}_0"], info[f"{name}_1"]) for info in infos} == {(a, b) for a in (0, 1) for b in (0, 1)}


def test_the_same_kernel_written_twice(peaked):
    """`block` with one block is `horizon`, entry by entry."""
    horizon = cut_law("horizon", start=0, horizon=3, block_size=3)
    block = cut_law("block", start=0, horizon=3, block_size=3)
    assert_same_kernel(peaked.metropolis(4.0, block), peaked.metropolis(4.0, horizon), peaked.paths)
    with pytest.raises(AssertionError, match="P differs"):
        assert_same_kernel(peaked.metropolis(4.0, Length()), peaked.metropolis(4.0, horizon), peaked.paths)


@pytest.mark.parametrize("eos", [frozenset(), frozenset({0}), frozenset({0, 1}), frozenset({0, 1, 2})])
def test_any_number_of_end_ids(eos, peaked):
    """None: every path fills the horizon. All: every path has one token."""
    toy = toys.Toy(peaked.model, Space(eos, 2))
    assert {len(x) for x in toy.paths} == ({2} if not eos else {1} if len(eos) == 3 else {1, 2})
    prove(toy.metropolis(4.0, temperature=0.5), toy.paths, law=toy.power(4.0))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=3 * settings().max_examples)
def test_many_more(data):
    """The composition test on larger models and three times the examples of the profile."""
    toy = data.draw(toys.toys(max_paths=40))
    target = data.draw(toys.path_targets(toy))
    kernel, reversible = data.draw(toys.kernels(toy, target, parts=3, cycle=len(toy.paths) < 10))
    prove(kernel, toy.paths, reversible=reversible)

"""Delayed acceptance proved by enumeration on pairs (target, surrogate) that hypothesis draws.

The surrogate knows nothing of the target. Every proof names the law it means: p^alpha of the *target*'s table.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.choices import Stream
from powermc.kernels import DelayedAcceptance, Metropolis, Mixture
from powermc.kernels.metropolis import stayed
from powermc.proposals import RandomWalk
from powermc.scheduling import run
from powermc.sequences import ByCut, Entropy, Length, Space, Substitution, Suffix, UncertainTail
from powermc.sequences.model import Extend, Score
from powermc.targets import Table
from powermc.testing import assert_same_kernel, enumerate_kernel, paths_of, prove
from powermc.testing import pairs as on
from powermc.testing import strategies as toys
from powermc.testing.pairs import power
from powermc.testing.strategies import Toy
from powermc.toy import TabularModel
from powermc.types import Move, State, evaluate
from tests.exactness.mutants_delayed import unsure

PROPOSALS = (
    "suffix by the surrogate",
    "suffix by the target",
    "substitution by the surrogate",
    "substitution by the target",
)


def proposals(pair, kind):
    what, _, who = kind.partition(" by the ")
    generator = st.just(getattr(pair, who).model)
    return on.suffixes(pair, generator) if what == "suffix" else on.substitutions(pair, generator)


def companion(pair, kernel):
    """A substitution never changes the length, so it is proved together with a kernel that does."""
    if isinstance(kernel.proposal, Substitution):
        by_suffix = DelayedAcceptance(kernel.stages, Suffix(pair.surrogate.model, pair.space, Length()), kernel.gate)
        return Mixture([kernel, by_suffix], [0.7, 0.3])
    return kernel


def check(kernel, pair, alpha, **claims):
    claims = {"carried": len(pair.paths) < 8, **claims}
    return prove(kernel, pair.paths, law=pair.target.power(alpha), **claims)


def mass(found, what):
    """The stationary probability of a step of which `what` holds."""
    return sum(
        pi * probability
        for pi, leaves in zip(found.pi, found.leaves, strict=True)
        for (_, info), probability in leaves
        if what(info)
    )


def gated(info):
    return info.get("gated", False)


def same(info):
    return info.get("same", False)


def screened(info):
    return not info["null"] and not info["gated"] and not same(info)


# Stages


@given(st.data())
@settings(max_examples=8)
def test_one_stage_is_metropolis(data):
    """Entry by entry and to the last bit, with a gate too: there is nothing to choose between."""
    pair = data.draw(on.pairs())
    alpha = data.draw(toys.alphas())
    q = data.draw(proposals(pair, data.draw(st.sampled_from(PROPOSALS))))
    target = power(pair.target, alpha)
    for gate in (None, UncertainTail(pair.surrogate.model, eta=0.5)):
        plain = Metropolis(target, q, early_rejection=gate is None)  # under a gate it is off
        assert_same_kernel(DelayedAcceptance([target], q, gate), plain, pair.paths, tol=0.0)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("kind", PROPOSALS)
@given(data=st.data())
@settings(max_examples=5)
def test_stages(kind, stages, data):
    """Irreducible, as the surrogates are positive: powers of the surrogate or of a third model, tables, by the cut."""
    pair = data.draw(on.pairs())
    alpha = data.draw(toys.alphas())
    screens = [data.draw(on.surrogates(pair)) for _ in range(stages - 1)]
    kernel = DelayedAcceptance([*screens, power(pair.target, alpha)], data.draw(proposals(pair, kind)))
    check(companion(pair, kernel), pair, alpha)


@given(st.data())
@settings(max_examples=6)
def test_the_usual_choice(data):
    """Suffix drawn by the surrogate at temperature 1/beta and screened by its own power beta: in stage 1 only the
    normalisers and the cut law are left."""
    pair = data.draw(on.pairs())
    alpha, beta = data.draw(toys.alphas()), data.draw(st.sampled_from([2.0, 1.0, 4.0, 0.5]))
    q = Suffix(pair.surrogate.model, pair.space, data.draw(toys.cut_laws(pair.space.horizon)), 1 / beta)
    found = check(DelayedAcceptance([power(pair.surrogate, beta), power(pair.target, alpha)], q), pair, alpha)
    for leaves in found.leaves:
        for (_, info), _ in leaves:
            if same(info):
                assert info["accepted"] > info["changed"]
                assert not {"stage", "stage1_accepted", "log_surrogate", "log_target"} & info.keys()
            elif not info["null"]:
                assert info["changed"] == info["accepted"] == (info["stage"] == 2)
                assert info["stage1_accepted"] == (info["stage"] > 0)
                assert np.isfinite(info.get("log_surrogate", np.nan)) == (not info.get("abandoned", False))
                assert info["stage"] == 0 or not info.get("abandoned", False)
                assert ("log_target" in info) == (info["stage"] > 0)


@given(st.data())
@settings(max_examples=10)
def test_a_surrogate_with_zeros_and_a_plain_share(data):
    """Where the surrogate vanishes, its moves neither come nor go: exact, but not irreducible on its own. A tenth of
    plain Metropolis-Hastings proposed by the target's own model repairs it."""
    pair = data.draw(on.pairs(zeros=True))
    alpha = data.draw(toys.alphas())
    q = data.draw(proposals(pair, data.draw(st.sampled_from(PROPOSALS))))
    screens = data.draw(st.lists(on.surrogates(pair, zeros=True), min_size=1, max_size=2))
    kernel = DelayedAcceptance([*screens, power(pair.target, alpha)], q)
    plain = pair.target.metropolis(alpha, Length(), data.draw(toys.temperatures()))
    check(kernel, pair, alpha, irreducible=False, carried=False)
    check(Mixture([kernel, plain], [0.9, 0.1]), pair, alpha)


@pytest.mark.parametrize("kind", PROPOSALS)
@given(data=st.data())
@settings(max_examples=3)
def test_never_more_moves_than_metropolis(kind, data):
    """Peskun: off the diagonal P_delayed <= P_plain, for the same proposal and target, gate or no gate."""
    pair = data.draw(on.pairs(zeros=True))
    target, q = power(pair.target, data.draw(toys.alphas())), data.draw(proposals(pair, kind))
    plain = enumerate_kernel(Metropolis(target, q), pair.paths).matrix
    for gate in (None, UncertainTail(pair.surrogate.model, delta=0.4, aggregate="mean")):
        matrix = enumerate_kernel(
            DelayedAcceptance([data.draw(on.surrogates(pair)), target], q, gate), pair.paths
        ).matrix
        excess = matrix - plain
        np.fill_diagonal(excess, 0.0)
        assert excess.max() <= 1e-13


# A proposal that is the current path


class AsksAlways(DelayedAcceptance):
    """The kernel written out without the shortcut: gate and stages are asked about y = x as about any y."""

    def step(self, choices, state):
        move = yield from self.proposal.propose(choices.at("proposal"), state.value)
        x, y, cut = move.origin, move.value, move.auxiliary
        if move.null:
            return State(x, state.log_density), stayed(move)
        gated = False
        for value in (x, y) if self.gate else ():
            _, unsure = yield from self.gate.uncertain(value, cut)
            gated = gated or unsure
        accepted, last = True, -move.log_hastings
        for i, stage in enumerate(self.stages[-1:] if gated else self.stages):
            stage = stage.given(cut) if hasattr(stage, "given") else stage
            _, here = yield from evaluate(stage, x)
            _, there = yield from evaluate(stage, y)
            accepted = accepted and choices.at("accept", i).level().below(there - here - last)
            last = there - here
        _, log_density = yield from evaluate(self.stages[-1], y)
        info = {"null": False, "gated": gated, "accepted": accepted, "asked_of_itself": x == y}
        return (State(y, log_density) if accepted else State(x, state.log_density)), info


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("kind", PROPOSALS)
@given(data=st.data())
@settings(max_examples=4)
def test_not_asking_about_the_current_path_changes_no_entry(kind, gate, data):
    """P with the shortcut is P without it, surrogates with zeros, gates and routes by the cut included."""
    pair = data.draw(on.pairs(zeros=True))
    q = data.draw(proposals(pair, kind))
    screens = data.draw(st.lists(on.surrogates(pair, zeros=True), min_size=1, max_size=2))
    stages = [*screens, power(pair.target, data.draw(toys.alphas()))]
    open_to = UncertainTail(pair.surrogate.model, eta=0.7, delta=0.2) if gate else None
    fast, written = (
        enumerate_kernel(kernel(stages, q, open_to), pair.paths) for kernel in (DelayedAcceptance, AsksAlways)
    )
    assert_same_kernel(fast, written)
    proposed = mass(fast, same)
    assert proposed == pytest.approx(mass(written, lambda info: info.get("asked_of_itself")), abs=1e-12)
    assert proposed > 0 or mass(fast, lambda info: info["null"]) == pytest.approx(1)


class Standing:
    """Proposes what is there, by another object."""

    fields = MappingProxyType({})

    def propose(self, choices, value):
        return Move(Space(frozenset({2}), 3).path(value.prompt, value.tokens), value, info={"cut": 1})
        yield


class NoAcceptance:
    def at(self, purpose, index=0):
        assert purpose == "proposal"


def test_a_proposal_of_the_current_path_asks_nobody(counted):
    """Not one request, whoever could be asked: the path stays as unscored as it was, and no level is drawn."""
    space = Space(frozenset({2}), 3)
    kernel = DelayedAcceptance(
        [power(Toy(model, space), 2.0) for model in counted], Standing(), UncertainTail(counted[0], eta=0.1)
    )
    path = paths_of(space, 3)[0]
    step = kernel.step(NoAcceptance(), State(path, -1.5))
    with pytest.raises(StopIteration) as ended:
        next(step)
    state, info = ended.value.value
    assert state.value is path
    assert state.log_density == -1.5
    assert not any(path.scored(model) for model in counted)
    assert all(model.take() == ([], 0) for model in counted)
    assert info == {"accepted": True, "changed": False, "null": False, "gated": False, "same": True, "cut": 1}


# Gates


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("kind", ["eta", "delta", "both"])
@given(data=st.data())
@settings(max_examples=6)
def test_gates(kind, aggregate, data):
    """Thresholds among the values that uncertainty takes on the moves: both masses are positive."""
    pair = data.draw(on.pairs())
    alpha = data.draw(toys.alphas())
    q = data.draw(proposals(pair, data.draw(st.sampled_from(PROPOSALS))))
    gate = data.draw(on.gates(pair, q, pair.surrogate.model, kind=kind, aggregate=aggregate))
    screens = data.draw(st.lists(on.surrogates(pair), min_size=1, max_size=2))
    kernel = DelayedAcceptance([*screens, power(pair.target, alpha)], q, gate)
    found = check(kernel, pair, alpha, irreducible=not isinstance(q, Substitution))
    assert mass(found, gated) > 0
    assert mass(found, screened) > 0
    if isinstance(q, Substitution):
        check(companion(pair, kernel), pair, alpha, carried=False)


@given(st.data())
@settings(max_examples=12)
def test_whatever_the_cut_chooses(data):
    """Generator, stage and thresholds are all functions of (m, x_<m), with every cut law; entropy cuts are weighed by
    the first model whichever draws."""
    pair = data.draw(on.pairs())
    alpha = data.draw(toys.alphas())
    generators = on.routed(pair)
    q = data.draw(st.one_of(on.suffixes(pair, generators), on.substitutions(pair, generators)))
    gate = data.draw(
        on.gates(pair, q, data.draw(generators), kind=data.draw(st.sampled_from(["eta", "delta"])), by_cut=True)
    )
    screens = [ByCut([power(pair.surrogate, 2.0), power(pair.surrogate, 0.5)], on.ByParity((0, 1, 1)))]
    kernel = DelayedAcceptance([*screens, power(pair.target, alpha)], q, gate)
    plain = pair.target.metropolis(alpha, Length())
    found = check(Mixture([kernel, plain], [0.9, 0.1]), pair, alpha)
    assert mass(found, gated) > 0
    assert mass(found, lambda info: info["component"] == 0 and screened(info)) > 0


def test_entropy_cuts_with_two_generators(peaked, surrogate):
    """The law is one fixed model's: with that of the model which happens to draw, it would not cancel."""
    models = ByCut([surrogate.model, peaked.model], on.ByParity((0, 1)))
    q = Suffix(models, peaked.space, Entropy(), 0.5)
    prove(Metropolis(power(peaked, 2.0), q), peaked.paths, law=peaked.power(2.0), irreducible=False)


@pytest.fixture(scope="module")
def surrogate(peaked):
    return unsure(peaked.space.horizon)


@pytest.mark.parametrize("kind", PROPOSALS)
def test_on_three_positions_with_the_state_carried_over(kind, peaked, surrogate):
    """Stages, gate and partly scored paths through two steps at horizon 3, where the drawn examples take one."""
    target, model = power(peaked, 2.0), surrogate.model
    who = peaked.model if kind.endswith("target") else model
    q = Suffix(who, peaked.space, Length(), 0.5) if kind.startswith("suffix") else Substitution(who, peaked.space, 1)
    kernel = DelayedAcceptance([power(surrogate, 2.0), target], q, UncertainTail(model, 0.95, 0.4, "mean"))
    found = prove(kernel, peaked.paths, law=peaked.power(2.0), irreducible=kind == PROPOSALS[0])
    assert mass(found, gated) > 0.01
    assert mass(found, screened) > 0.01


# What it costs


class Counted(TabularModel):
    """Keeps the paths it was asked to score, and counts the tokens it was asked to draw."""

    def answer(self, requests):
        asked = self.__dict__.setdefault("asked", {Score: [], Extend: []})
        for request in requests:
            asked[type(request)].append(getattr(request, "path", None))
        return super().answer(requests)

    def take(self):
        asked = self.__dict__.pop("asked", {Score: [], Extend: []})
        return asked[Score], len(asked[Extend])


@pytest.fixture
def counted():
    """Cheap, middling and expensive model of one space, not too far from each other, so that all stages matter."""
    cheap = unsure(3).model.table
    others = [TabularModel.random(i, vocab_size=3, order=2, concentration=0.7).table for i in range(2)]
    return [Counted(table, 2) for table in (cheap, (cheap + others[0]) / 2, (cheap + others[1]) / 2)]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_stage_is_asked_only_about_what_passed_the_stage_before(tokens, gate, counted):
    """The target scores a survivor once and nothing else; the middle stage what passed the first. A suffix drawn by the
    surrogate is never scored by it, as the draft has done that."""
    cheap, middle, _ = counted
    space = Space(frozenset({2}), 3)
    q = Substitution(cheap, space, tokens) if tokens else Suffix(cheap, space, Length())
    kernel = DelayedAcceptance(
        [power(Toy(model, space), 2.0) for model in counted], q, UncertainTail(cheap, eta=1.05) if gate else None
    )
    state = run(kernel.init(space.path(paths_of(space, 3)[0].prompt, (0, 1, 0))))
    seen = set()
    for model in counted:
        model.take()
    for i in range(800):
        before, known = state, state.value.scored(middle)
        state, info = run(kernel.step(Stream(0).step(i), state))
        (by_cheap, drawn), (by_middle, _), (by_target, _) = (model.take() for model in counted)
        passed = info.get("stage", -1)
        seen.add("null" if info["null"] else "same" if same(info) else (passed, info["gated"]))
        if info["null"] or same(info):
            assert not by_middle
            assert not by_target
            assert state.value == before.value
            assert state.log_density == before.log_density
            assert info["null"] or drawn == info["proposal_length"] > 0
            assert tokens or i == 0 or not by_cheap
            continue
        assert drawn == info["proposal_length"] > 0
        assert len(by_target) == (info["gated"] or passed >= 2)
        assert all(state.value == y or not info["accepted"] for y in by_target)
        assert len(by_middle) == (0 if info["gated"] or passed == 0 else 1 + (not known))
        if not tokens and i > 0:
            assert not by_cheap
        if not info["accepted"]:
            assert state.value == before.value
            assert state.log_density == before.log_density
        assert state.value.scored(cheap) or info["gated"]
    expected = {"same", (0, False), (1, False), (2, False), (3, False)} | ({(-1, True)} if gate else set())
    assert seen - {"null"} == expected


def test_the_middle_stage_is_never_asked_about_a_gated_pair(counted):
    """Always open for all that is not certain: the target alone decides."""
    space = Space(frozenset({2}), 3)
    cheap, middle, target = counted
    stages = [power(Toy(model, space), 2.0) for model in counted]
    kernel = DelayedAcceptance(stages, Suffix(cheap, space, Length(), 0.5), UncertainTail(cheap, eta=0.0))
    state = run(kernel.init(paths_of(space, 3)[0]))
    infos = []
    for i in range(30):
        state, info = run(kernel.step(Stream(1).step(i), state))
        assert info["gated"] != same(info)
        infos.append(info)
    assert not middle.take()[0]
    moves = sum(info["gated"] for info in infos)
    assert 0 < moves < 30
    assert len(target.take()[0]) == 1 + moves


# Null moves, errors, declarations


@pytest.mark.parametrize("kind", ["suffix", "substitution"])
@given(data=st.data())
@settings(max_examples=5)
def test_a_generator_that_cannot_draw_the_current_path_stays_and_is_counted(kind, data):
    """A pruned head: no error, a no-op with `null` set; and moves that it can make do not come back to such paths."""
    pair = data.draw(on.pairs(zeros=True))
    surrogate = pair.surrogate.model
    q = data.draw((on.suffixes if kind == "suffix" else on.substitutions)(pair, st.just(surrogate)))
    kernel = DelayedAcceptance([power(pair.surrogate, 1.0), power(pair.target, 1.0)], q)
    found = check(kernel, pair, 1.0, irreducible=False, carried=False)
    for x, leaves in zip(found.values, found.leaves, strict=True):
        possible = [surrogate.table[surrogate.context(x.tokens[:t])][v] > 0 for t, v in enumerate(x.tokens)]
        for (state, info), _ in leaves:
            m = info.get("cut", -1)
            n = len(x) - (x.tokens[-1] in pair.space.eos)
            drawn = possible[m:] if kind == "suffix" else possible[m : m + min(getattr(q, "tokens", 0), n)]
            if 0 <= m < len(x) and not all(drawn):
                assert info["null"]
            if info["null"]:
                assert state.value == x
                assert not info["accepted"]


@given(st.data())
@settings(max_examples=8)
def test_infos_hold_what_the_kernel_declares(data):
    pair = data.draw(on.pairs(max_paths=7, zeros=True))
    q = data.draw(proposals(pair, data.draw(st.sampled_from(PROPOSALS))))
    kernel = DelayedAcceptance(
        [data.draw(on.surrogates(pair, zeros=True)), power(pair.target, 2.0)],
        q,
        UncertainTail(pair.surrogate.model, 0.3),
    )
    for leaves in enumerate_kernel(kernel, pair.paths).leaves:
        for (_, info), _ in leaves:
            assert info.keys() <= kernel.fields.keys()
            assert info.keys() >= {"accepted", "changed", "null"}
            for name, value in info.items():
                np.array(value).astype(kernel.fields[name].dtype, casting="same_kind")


def test_any_space():
    """Numbers on a line: the kernel knows no tokens. The chain of Christen & Fox written out for one pair."""
    target, screen = (Table(dict(enumerate(np.log(w)))) for w in ([1.0, 2.0, 4.0], [3.0, 1.0, 1.0]))
    walk = RandomWalk({0: [1], 1: [0, 2], 2: [1]}.__getitem__)
    found = prove(DelayedAcceptance([screen, target], walk), range(3), law=[1, 2, 4])
    # 0 -> 1: q 1 then 1/2, so a_1 = 1/3 / 2, a_2 = 2 * 3; 1 -> 2: a_1 = 2, a_2 = 2.
    assert np.isclose(found.matrix[0, 1], 1 / 6)
    assert np.isclose(found.matrix[1, 2], 0.5)
    assert np.isclose(found.matrix[1, 0], 0.5 * 1 / 6)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60)
def test_many_more(data):
    """Everything at once, on larger spaces."""
    pair = data.draw(on.pairs(max_paths=31, zeros=True))
    alpha = data.draw(toys.alphas())
    generators = on.routed(pair)
    q = data.draw(st.one_of(on.suffixes(pair, generators), on.substitutions(pair, generators)))
    gate = data.draw(
        on.gates(
            pair,
            q,
            data.draw(generators),
            kind=data.draw(st.sampled_from(["eta", "delta", "both"])),
            aggregate=data.draw(st.sampled_from(["max", "mean"])),
            by_cut=data.draw(st.booleans()),
        )
    )
    screens = data.draw(st.lists(on.surrogates(pair, zeros=True), min_size=1, max_size=2))
    kernel = DelayedAcceptance([*screens, power(pair.target, alpha)], q, data.draw(st.sampled_from([gate, None])))
    found = check(Mixture([kernel, pair.target.metropolis(alpha)], [0.9, 0.1]), pair, alpha)
    assert kernel.gate is None or mass(found, gated) > 0

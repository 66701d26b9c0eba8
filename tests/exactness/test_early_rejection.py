"""Early rejection changes no entry of P, no state of a chain: only how many tokens are drawn.

pi P = pi would miss a wrong one (a draft that is never made loses both directions of a move), so every proof here is
P_fast = P_plain, entry by entry. The mutants are in `mutants_early.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powermc.choices import Stream
from powermc.kernels import DelayedAcceptance, Metropolis, Mixture
from powermc.scheduling import run
from powermc.sequences import (
    BlockwisePower,
    ByCut,
    Entropy,
    Horizon,
    Length,
    Path,
    Prompt,
    Screening,
    SequenceProbability,
    Space,
    Substitution,
    Suffix,
    UncertainTail,
    draft,
    scored,
)
from powermc.stages import count_stages
from powermc.targets import Power, Product, Table, Tempered, Tilted
from powermc.testing import assert_same_kernel, assert_stochastic, enumerate_kernel, paths_of, prove
from powermc.testing import pairs as on
from powermc.testing import strategies as toys
from powermc.toy import TabularModel
from tests.exactness.mutants_delayed import unsure, written
from tests.exactness.mutants_early import MUTANTS, Bent, bonus
from tests.exactness.test_mutants import search

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 0.4, 0.2)
"""On both sides of 1/alpha for every alpha of `toys.alphas`, and over 1."""


def twin(kernel: Any) -> Any:
    """The same kernel without early rejection."""
    return replace(kernel, early_rejection=False)


def abandoned_mass(found: Any) -> float:
    """The stationary probability of a step whose draft is abandoned."""
    return sum(
        pi * probability
        for pi, leaves in zip(found.pi, found.leaves, strict=True)
        for (_, info), probability in leaves
        if info.get("abandoned")
    )


def same(kernel: Any, paths: Any, *, carried: bool = False) -> float:
    """P_fast = P_plain, and what `prove` says of P_fast but irreducibility; the mass abandoned."""
    fast, plain = prove(kernel, paths, irreducible=False, carried=carried), enumerate_kernel(twin(kernel), paths)
    assert_same_kernel(fast, plain)
    assert abandoned_mass(plain) == 0
    return abandoned_mass(fast)


@st.composite
def bounded_targets(draw: Any, toy: Any) -> Any:
    """Targets of every kind, most of them with a bound: rewards with -inf, declared or not, products, bridges."""
    power = Power(SequenceProbability(toy.model), draw(toys.alphas()))
    kind = draw(st.sampled_from(["power", "tilted", "loose", "undeclared", "product", "experts", "bridge"]))
    if kind == "power":
        return power
    reward = draw(toys.rewards(toy))
    other = SequenceProbability(draw(toys.models(toy.space, toy.model.vocab_size, zeros=False)))
    most = reward.bound(None).rest
    return {
        "tilted": Tilted(power, reward.log_density, most),
        "loose": Tilted(power, reward.log_density, most + 1.5),
        "undeclared": Tilted(power, reward.log_density),
        "product": Product((power, reward)),
        "experts": Product((power, Power(other, 1.5))),
        "bridge": Tempered(Power(SequenceProbability(toy.model), 6.0), Product((power, reward)), 0.5),
    }[kind]


# Metropolis-Hastings


@given(st.data())
@settings(max_examples=30)
def test_metropolis(data):
    """All targets, cut laws and temperatures; stop rules, zeros and peaked rows come with the toys."""
    toy = data.draw(toys.toys(max_paths=15))
    q = toy.suffix(data.draw(toys.cut_laws(toy.space.horizon, start=True)), data.draw(st.sampled_from(TEMPERATURES)))
    kernel = Metropolis(data.draw(bounded_targets(toy)), q)
    same(kernel, toy.paths, carried=len(toy.paths) < 8)


@pytest.mark.parametrize("cuts", [Length(), Horizon(3), Entropy()])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
def test_drafts_are_abandoned(alpha, cuts, peaked):
    """From temperature 1/alpha to 1, and only there. At alpha 1 nothing is left to lose but the cut law."""
    for temperature in {1.0, 0.5, 1 / alpha}:
        mass = same(peaked.metropolis(alpha, cuts, temperature), peaked.paths)
        expected = temperature >= 1 / alpha and (alpha > 1 or not isinstance(cuts, Horizon))
        assert (mass > 0.005) == expected, (temperature, mass)


@pytest.mark.parametrize("cuts", [Length(1), Horizon(3, 1), Entropy(1)])
def test_drafts_after_a_frozen_prefix_are_abandoned(cuts, peaked):
    """The law counts from its start on."""
    assert same(peaked.metropolis(2.0, cuts, 1.0), peaked.paths) > 0.01


OFF = {
    "alpha under 1": lambda toy, p: Metropolis(Power(p, 0.5), toy.suffix(None, 1.0)),
    "alpha under 1, temperature 1/alpha": lambda toy, p: Metropolis(Power(p, 0.5), toy.suffix(None, 2.0)),
    "temperature under 1/alpha": lambda toy, p: Metropolis(Power(p, 2.0), toy.suffix(None, 0.4)),
    "temperature over 1": lambda toy, p: Metropolis(Power(p, 2.0), toy.suffix(None, 1.5)),
    "reward without a bound": lambda toy, p: Metropolis(Tilted(Power(p, 2.0), bonus), toy.suffix(None, 0.7)),
    "another model draws": lambda toy, p: Metropolis(Power(p, 2.0), unsure(3).suffix(None, 0.7)),
    "switched off": lambda toy, p: Metropolis(Power(p, 2.0), toy.suffix(None, 0.7), early_rejection=False),
    "unknown target": lambda toy, p: Metropolis(Unknown(), toy.suffix(None, 0.7)),
    "a ratio of its own": lambda toy, p: Metropolis(Power(p, 2.0), Renamed(toy.model, toy.space, Length(), 0.7)),
    "a density of its own": lambda toy, p: Metropolis(Squared(p, 2.0), toy.suffix(None, 0.7)),
    "substitution": lambda toy, p: Metropolis(Power(p, 2.0), Substitution(toy.model, toy.space, 2, 0.7)),
}


class Unknown:
    """The uniform law, which says nothing of itself."""

    def log_density(self, value):
        return 0.0

    def missing(self, value):
        return None


class Renamed(Suffix):
    """Has the ratio of a suffix proposal by another method, of which the bound knows nothing."""

    def log_hastings(self, x, y, m):
        return super().log_hastings(x, y, m)


class Squared(Power):
    """Inherits the bound of `Power`, but not its density."""

    def log_density(self, value):
        return 0.5 * super().log_density(value)


@pytest.mark.parametrize("why", OFF)
def test_off_by_itself(why, peaked):
    """To the last bit: the level is compared once, with the ratio."""
    kernel = OFF[why](peaked, SequenceProbability(peaked.model))
    fast, plain = enumerate_kernel(kernel, peaked.paths), enumerate_kernel(twin(kernel), peaked.paths)
    assert_same_kernel(fast, plain, tol=0.0)
    assert abandoned_mass(fast) == 0
    assert abandoned_mass(enumerate_kernel(peaked.metropolis(2.0, None, 0.7), peaked.paths)) > 0.01


def test_rewards_and_products_are_on_where_they_are_bounded():
    toy = FIXED.target
    p, expert = (SequenceProbability(t.model) for t in (toy, FIXED.surrogate))
    table = Table({x: bonus(x) for x in toy.paths})
    for target in (
        Tilted(Power(p, 4.0), bonus, 3.0),
        Product((Power(p, 4.0), Power(expert, 0.5))),
        Product((Power(p, 4.0), table)),
        Tempered(Power(p, 6.0), Product((Power(p, 2.0), table)), 0.5),
    ):
        assert same(Metropolis(target, toy.suffix()), toy.paths) > 0.01


def test_the_default_temperature_may_round_to_an_exponent_over_alpha(peaked):
    """1 / (1 / 49) > 49: the bound holds all the same, and is used."""
    alpha = 49.0
    assert 1 / (1 / alpha) > alpha
    milder = written(3, {(): (0.40, 0.28, 0.32), (0,): (0.3, 0.4, 0.3), (1,): (0.36, 0.3, 0.34)})
    assert same(milder.metropolis(alpha, None, 1 / alpha), milder.paths) > 1e-4


def test_models_by_the_cut(peaked):
    """Only where the target's own model draws; entropy cuts weighed by a model that does not draw have the bound 0."""
    models = [peaked.model, unsure(3).model]
    for rule, cuts in [((0, 1), Length()), ((0, 1), Entropy()), ((1, 0), Entropy()), ((1, 1), Length())]:
        routed = ByCut(models, on.ByParity(rule))
        kernel = Metropolis(Power(SequenceProbability(peaked.model), 2.0), Suffix(routed, peaked.space, cuts, 0.7))
        assert (same(kernel, peaked.paths) > 0) == (0 in rule)


# Delayed acceptance


@given(st.data())
@settings(max_examples=15)
def test_delayed_acceptance(data):
    """Surrogates of every kind, by the cut too, one to three stages, gates."""
    pair = data.draw(on.pairs(zeros=True))
    cuts, temperature = data.draw(toys.cut_laws(pair.space.horizon)), data.draw(st.sampled_from(TEMPERATURES))
    q = Suffix(data.draw(on.routed(pair)), pair.space, cuts, temperature)
    own = st.sampled_from([2.0, 4.0, 1.0]).map(lambda beta: on.power(pair.surrogate, beta))
    screens = data.draw(st.lists(st.one_of(own, on.surrogates(pair, zeros=True)), max_size=2))
    gate = data.draw(st.sampled_from([None, None, UncertainTail(pair.surrogate.model, eta=0.7)]))
    mass = same(DelayedAcceptance([*screens, on.power(pair.target, data.draw(toys.alphas()))], q, gate), pair.paths)
    assert gate is None or mass == 0


@pytest.mark.parametrize(("beta", "cuts"), [(2.0, Length()), (4.0, Horizon(3)), (2.0, Entropy())])
def test_stage_1_abandons_and_a_gate_forbids_it(beta, cuts, peaked):
    surrogate = written(
        3, {(): (0.6, 0.3, 0.1), (0,): (0.05, 0.9, 0.05), (1,): (0.5, 0.3, 0.2), (0, 1): (0.3, 0.3, 0.4)}
    )
    stages = [on.power(surrogate, beta), on.power(peaked, 2.0)]
    for temperature in (0.5, 0.25):
        q = Suffix(surrogate.model, peaked.space, cuts, temperature)
        assert (same(DelayedAcceptance(stages, q), peaked.paths) > 0.01) == (temperature >= 1 / beta)
        assert same(DelayedAcceptance(stages, q, UncertainTail(surrogate.model, eta=0.5)), peaked.paths) == 0
    by_cut = ByCut([stages[0], on.power(surrogate, 0.5)], on.ByParity((0, 1)))
    assert (
        same(DelayedAcceptance([by_cut, stages[1]], Suffix(surrogate.model, peaked.space, cuts, 0.5)), peaked.paths) > 0
    )


def test_three_of_a_kind(peaked):
    """Through `Mixture`, as a screened kernel with plain steps is used, the state carried over two steps."""
    small = written(2, {(): (0.55, 0.10, 0.35), (0,): (0.05, 0.80, 0.15), (1,): (0.60, 0.10, 0.30)})
    other = unsure(2)
    for tilt in (lambda base: base, lambda base: Tilted(base, bonus, 2.0)):
        target = tilt(on.power(small, 2.0))
        fast, plain = (
            Screening(other.model, 2.0, 1.0, plain=0.3).kernel(
                small.model, small.space, Length(), 1.0, target, tilt, early_rejection=early
            )
            for early in (True, False)
        )
        assert isinstance(fast, Mixture)
        found = prove(fast, small.paths)
        assert_same_kernel(found, plain, small.paths)
        by_component = {
            info["component"] for leaves in found.leaves for (_, info), _ in leaves if info.get("abandoned")
        }
        assert by_component == {0, 1}


# What an abandoned draft tells


def test_infos(peaked):
    """Declared; rejected, unchanged, not null; the bound and the level; what was drawn; stage 0."""
    target, surrogate = on.power(peaked, 2.0), unsure(3)
    q = Suffix(surrogate.model, peaked.space, Length(), 0.7)
    kernels = [peaked.metropolis(2.0, None, 0.7), DelayedAcceptance([on.power(surrogate, 2.0), target], q)]
    for kernel in kernels:
        state, seen = run(kernel.init(peaked.paths[0])), []
        for i in range(150):
            before = state
            state, info = run(kernel.step(Stream(3).step(i), state))
            if not info.get("abandoned"):
                continue
            seen.append(info)
            assert info.keys() <= kernel.fields.keys()
            assert not info["accepted"] | info["changed"] | info["null"]
            assert info["log_level"] >= info["log_ratio"]
            assert 0 < info["proposal_length"] == info["tokens"] < 3 - info["cut"]
            assert info["near_ties"] == 0
            assert state.value == before.value
            assert state.log_density == before.log_density
            if kernel is kernels[1]:
                assert (info["stage"], info["stage1_accepted"], info["gated"]) == (0, False, False)
                assert not {"log_surrogate", "log_target", "same"} & info.keys()
        assert len(seen) > 5
    fields = {name: field for name, field in kernels[1].fields.items() if name != "proposed"}
    columns = {n: np.array([i.get(n, f.fill) for i in seen]) for n, f in fields.items()}
    stages = count_stages([{**columns, "component": np.zeros(len(seen), int)}])
    assert stages.screened == stages.saved == len(seen)
    assert stages.completed_tokens == stages.passed == 0


# The same streams


class Counting(TabularModel):
    """Counts the tokens it draws."""

    def _extend(self, request):
        self.__dict__["drawn"] = self.__dict__.get("drawn", 0) + 1
        return super()._extend(request)


def trace(kernel: Any, state: Any, steps: int, seed: int) -> list[Any]:
    """(tokens, log density, accepted) after each step."""
    states = []
    for i in range(steps):
        state, info = run(kernel.step(Stream(seed).step(i), state))
        states.append((state.value.tokens, state.log_density, info["accepted"]))
    return states


@pytest.mark.parametrize("cut", ["length", "horizon", "entropy"])
@pytest.mark.parametrize("screened", [False, True])
def test_the_same_states_for_fewer_tokens(screened, cut):
    """Production streams on longer paths: every state, density and decision, to the last bit."""
    rng = np.random.default_rng(2)
    tables = [np.hstack([0.95 * rng.dirichlet([1.0] * 3, size=25), np.full((25, 1), 0.05)]) for _ in range(2)]
    space = Space(frozenset({3}), 12)
    found = []
    for early in (True, False):
        full, other = (Counting(table, 2) for table in tables)
        screening = Screening(other, 1.5, 0.7, plain=0.3) if screened else None
        plan = BlockwisePower(
            full, space, alpha=2.0, temperature=0.7, block_size=12, cut=cut, screening=screening, early_rejection=early
        )
        kernel = plan.stage(0).kernel
        state = run(kernel.init(space.path(Prompt(), (0,) * 12)))
        states = trace(kernel, state, 400, seed=5)
        found.append((states, full.drawn + getattr(other, "drawn", 0)))
    (fast, few), (plain, many) = found
    assert fast == plain
    assert len({tokens for tokens, *_ in plain}) > 10
    assert few < (0.97 if screened else 0.9) * many


class Fixed:
    """Choices whose levels are all the same."""

    def __init__(self, stream, log_u):
        self.stream, self.log_u = stream, log_u

    def at(self, purpose, index=0):
        return Fixed(self.stream.at(purpose, index), self.log_u)

    def categorical(self, log_weights):
        return self.stream.categorical(log_weights)

    def level(self):
        return self

    def below(self, log_bound):
        return self.log_u < log_bound


@pytest.mark.parametrize("cuts", [Horizon(9), Length()])
@pytest.mark.parametrize("temperature", [0.25, 0.6, 1.0])
def test_rounding_rejects_nothing_that_the_ratio_accepts(temperature, cuts):
    """Levels that are the very log ratio of what will be drawn, and the two numbers next to it: the bound adds the same
    terms in another order. Token 1 is followed by itself for good, so that from there on nothing is left to lose, and
    the bound is the ratio but for rounding. Without the margin some of these drafts would be lost."""
    space, ties = Space(frozenset({2}), 9), 0
    for seed in range(4):
        table = np.random.default_rng(seed).dirichlet([1.0] * 3, size=16)
        table[1::4] = (0.0, 1.0, 0.0)
        q = Suffix(TabularModel(table, 2), space, cuts, temperature)
        fast = Metropolis(Power(SequenceProbability(q.model), 4.0), q)
        plain = twin(fast)
        for i in range(20):
            choices = Stream(seed).step(i)
            state = run(plain.init(run(draft(q.model, space, scored_start(q), 0, temperature, choices))[0]))
            _, info = run(plain.step(Fixed(choices.at("step"), -1e9), state))
            ratio = info.get("log_ratio", math.nan)
            for log_u in (ratio, math.nextafter(ratio, -math.inf), math.nextafter(ratio, math.inf)):
                level = Fixed(choices.at("step"), log_u)
                one, other = (run(kernel.step(level, state))[1] for kernel in (fast, plain))
                assert one["accepted"] == other["accepted"] == (log_u < ratio)
                ties += one["accepted"]
    assert ties > 15


def scored_start(q):
    """The empty path."""
    return run(scored(q.model, Path(Prompt(), (), finished=False), (1 / q.temperature,)))


# Mutants


FIXED = on.Pair(
    written(
        3,
        {
            (): (0.50, 0.30, 0.20),
            (0,): (0.15, 0.70, 0.15),
            (1,): (0.45, 0.15, 0.40),
            (0, 0): (0.05, 0.05, 0.90),
            (0, 1): (0.90, 0.05, 0.05),
            (1, 0): (0.40, 0.50, 0.10),
            (1, 1): (0.80, 0.10, 0.10),
        },
    ),
    written(
        3,
        {
            (): (0.30, 0.45, 0.25),
            (0,): (0.60, 0.10, 0.30),
            (1,): (0.20, 0.70, 0.10),
            (0, 0): (0.05, 0.60, 0.35),
            (0, 1): (0.34, 0.33, 0.33),
            (1, 0): (0.10, 0.10, 0.80),
            (1, 1): (0.90, 0.05, 0.05),
        },
    ),
)


def differs(mutant: Any, pair: Any) -> bool:
    """Whether the wrong kernel's P is not that of the right one without early rejection."""
    wrong, plain = (enumerate_kernel(kernel, pair.paths) for kernel in (mutant.wrong(pair), twin(mutant.right(pair))))
    assert_stochastic(wrong)
    try:
        assert_same_kernel(wrong, plain)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    """Each fails on a fixed pair, where its right twin passes."""
    assert differs(MUTANTS[name], FIXED)
    same(MUTANTS[name].right(FIXED), FIXED.paths)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_found_by_search(name):
    """Within 30 drawn pairs."""
    pair = search(on.pairs(max_paths=15), lambda pair: differs(MUTANTS[name], pair))
    same(MUTANTS[name].right(pair), pair.paths)


def test_what_the_mutants_bend_is_the_production_kernel(peaked):
    """`Bent` as it stands abandons what `Suffix` abandons."""
    right = peaked.metropolis(2.0, None, 0.7)
    bent = replace(right, proposal=Bent(peaked.model, peaked.space, Length(), 0.7))
    one, other = (enumerate_kernel(kernel, peaked.paths) for kernel in (right, bent))
    assert_same_kernel(one, other, tol=0.0)
    assert abandoned_mass(one) == abandoned_mass(other) > 0.01


@pytest.mark.parametrize("kind", ["suffix", "delayed"])
def test_two_steps_from_an_abandoned_draft(kind, peaked):
    """The state that it leaves is as good as any: P_2 = P P at horizon 3."""
    surrogate = unsure(3)
    q = Suffix(surrogate.model, peaked.space, Entropy(), 0.7)
    kernel = {
        "suffix": peaked.metropolis(4.0, Entropy(), 0.5),
        "delayed": DelayedAcceptance([on.power(surrogate, 2.0), on.power(peaked, 2.0)], q),
    }[kind]
    assert same(kernel, peaked.paths, carried=True) > 0


def test_all_paths_are_there():
    """The fixed pair is of horizon 3, where a draft can be abandoned after one token and after two."""
    assert len(FIXED.paths) == len(paths_of(FIXED.space, 3)) == 15

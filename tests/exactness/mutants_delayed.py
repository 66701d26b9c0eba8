"""Wrong delayed acceptance and wrong substitutions, each with one correction dropped or bent, beside its right twin.

Those of the acceptance rule bend one method of `WrittenOut`, which as it stands is `DelayedAcceptance` entry by entry
(asserted in test_mutants_delayed.py). Each is built from a pair of toys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from powermc.kernels import DelayedAcceptance, Metropolis, Mixture
from powermc.scheduling import run
from powermc.sequences import ByCut, Cut, Length, Space, Substitution, Suffix, UncertainTail, scored
from powermc.testing.pairs import ByParity, Pair, power
from powermc.testing.strategies import Toy
from powermc.toy import TabularModel
from powermc.types import Kernel, State, evaluate

ALPHA, BETA = 2.0, 2.0


def written(horizon: int, rows: dict[tuple[int, ...], tuple[float, ...]]) -> Toy:
    """Three tokens, the last one ends; rows by prefix, uniform where none is given."""
    flat = TabularModel(np.full((16, 3), 1 / 3), 2)
    table = flat.table.copy()
    for prefix, row in rows.items():
        table[flat.context(prefix)] = row
    return Toy(TabularModel(table, 2), Space(frozenset({2}), horizon))


def unsure(horizon: int) -> Toy:
    """A surrogate of full support, sure of itself in some places and not in others."""
    rows = {
        (): (0.70, 0.20, 0.10),
        (0,): (0.30, 0.40, 0.30),
        (1,): (0.85, 0.10, 0.05),
        (0, 0): (0.30, 0.30, 0.40),
        (0, 1): (0.10, 0.80, 0.10),
        (1, 0): (0.40, 0.35, 0.25),
        (1, 1): (0.90, 0.05, 0.05),
    }
    return written(horizon, rows)


# The acceptance rule


class WrittenOut(DelayedAcceptance):
    """Two stages and a gate, all of it evaluated at once, in parts that can be bent."""

    def step(self, choices, state):
        move = yield from self.proposal.propose(choices.at("proposal"), state.value)
        x, y = move.origin, move.value
        if move.null:
            return State(x, state.log_density), {}
        gated = yield from self.gated(x, y, move.auxiliary)
        surrogate = self.stages[0]
        surrogate = surrogate.given(move.auxiliary) if hasattr(surrogate, "given") else surrogate
        x, here = yield from self.current(surrogate, x, move.auxiliary)
        y, there = yield from evaluate(surrogate, y)
        y, log_density = yield from evaluate(self.target, y)
        screen, change = there - here, log_density - state.log_density
        for i, log_ratio in enumerate(self.log_ratios(screen, change, move, gated)):
            if not choices.at("accept", i).level().below(log_ratio):
                return State(x, state.log_density), {}
        return State(y, log_density), {}

    def gated(self, x, y, cut):
        if self.gate is None:
            return False
        _, first = yield from self.gate.uncertain(x, cut)
        _, second = yield from self.gate.uncertain(y, cut)
        return first or second

    def current(self, surrogate, x, cut):
        return (yield from evaluate(surrogate, x))

    def log_ratios(self, screen, change, move, gated):
        return [change + move.log_hastings] if gated else [screen + move.log_hastings, change - screen]


class GateOfTheProposal(WrittenOut):
    """Gates a pair if the proposed tail is uncertain, whatever the current one is."""

    def gated(self, x, y, cut):
        _, uncertain = yield from self.gate.uncertain(y, cut)
        return uncertain


class SecondStageAlone(WrittenOut):
    """Sends a gated pair straight to stage 2, by the ratio of stage 2."""

    def log_ratios(self, screen, change, move, gated):
        return [change - screen] if gated else super().log_ratios(screen, change, move, gated)


class HastingsTwice(WrittenOut):
    """Takes the ratio of the proposals into both stages."""

    def log_ratios(self, screen, change, move, gated):
        first, *second = super().log_ratios(screen, change, move, gated)
        return [first, *(ratio + move.log_hastings for ratio in second)]


class CutRatioTwice(WrittenOut):
    """Takes C(m | y) / C(m | x) into both stages."""

    def log_ratios(self, screen, change, move, gated):
        first, *second = super().log_ratios(screen, change, move, gated)
        q, m = self.proposal, move.auxiliary.position
        return [first, *(ratio + q.log_cut(move.value, m) - q.log_cut(move.origin, m) for ratio in second)]


class NoSecondStage(WrittenOut):
    """Accepts what the surrogate accepts."""

    def log_ratios(self, screen, change, move, gated):
        return super().log_ratios(screen, change, move, gated)[:1]


class AnotherPrefix(WrittenOut):
    """Scores the current tail by the surrogate under another prefix than its own: activations of some other path."""

    def current(self, surrogate, x, cut):
        x, here = yield from evaluate(surrogate, x)
        model = surrogate.base.model
        other = tuple((token + 1) % model.vocab_size for token in cut.prefix) + x.tokens[cut.position :]
        tail = range(cut.position, len(x))
        own, wrong = (sum(model.log_row(model.context(z[:t]))[0][z[t]] for t in tail) for z in (x.tokens, other))
        return x, here + surrogate.alpha * (wrong - own)


@dataclass(frozen=True, slots=True)
class Adapted(State):
    exponent: float = BETA


class GoesOnAdapting(DelayedAcceptance):
    """Lowers the surrogate's exponent after every rejection, for as long as the chain runs."""

    def step(self, choices, state):
        exponent = getattr(state, "exponent", BETA)
        tuned = DelayedAcceptance([replace(self.stages[0], alpha=exponent), self.target], self.proposal)
        new, info = yield from tuned.step(choices, state)
        return Adapted(new.value, new.log_density, exponent * (1.0 if info["accepted"] else 0.25)), info


# What the choices by the cut may see


class CutShowsTheTail(Suffix):
    """Tells stages and gate the whole current path instead of its prefix."""

    def propose(self, choices, value):
        move = yield from super().propose(choices, value)
        return move if move.null else replace(move, auxiliary=Cut(move.auxiliary.position, move.origin.tokens))


class GeneratorSeesTheTail(Suffix):
    """Chooses the generator by the whole current path."""

    def propose(self, choices, value):
        chosen = self.model.given(Cut(0, value.tokens))  # type: ignore[union-attr]
        return (yield from Suffix(chosen, self.space, self.cuts, self.temperature).propose(choices, value))


# Substitutions


class NoticesNoEnd(Substitution):
    """Redraws as if no token were an end: one may come to stand in the middle, or be redrawn."""

    def propose(self, choices, value):
        endless = Substitution(self.model, replace(self.space, eos=frozenset(), stop=None), self.tokens)
        return (yield from endless.propose(choices, value))


class EndMayBeDrawn(Substitution):
    """Draws end tokens too and trusts the check that the result is a path: at the horizon it is, with another n."""

    @property
    def law(self):
        return 1.0 / self.temperature


class NotNormalised(Substitution):
    """Takes q on the block for p^(1/T): forgets that it was renormalised without the end tokens."""

    def log_q(self, path, m, stop):
        return float(path.log_p[m:stop].sum()) / self.temperature


class KeepsOldScores(Substitution):
    """Takes the scores of the kept tail under the old prefix for those under the new one."""

    def propose(self, choices, value):
        value = yield from scored(self.model, value)
        move = yield from super().propose(choices, value)
        if move.null:
            return move
        x, y = move.origin, move.value
        n = len(y.log_p)
        old = (np.concatenate((a[:n], b[n:])) for a, b in ((y.log_p, x.log_p), (y.entropy, x.entropy)))
        margin = np.concatenate((y.margin[:n], x.margin[n:]))
        return replace(move, value=y.with_scores(self.model, *old, margin, {}, None))


# Twins


class Mutant(NamedTuple):
    """A wrong kernel and its right twin, as functions of a pair, and the assertions that find it on `FIXED`."""

    wrong: Callable[[Pair], Kernel[Any]]
    right: Callable[[Pair], Kernel[Any]]
    found_by: frozenset[str]


def gate(pair: Pair, **thresholds: Any) -> UncertainTail:
    """Open for tails whose mean entropy is in the upper half of the range it has over whole paths."""
    model = pair.surrogate.model
    entropies = [float(run(scored(model, x)).entropy.mean()) for x in pair.paths]
    middle = min((min(entropies) + max(entropies)) / 2, 0.99 * math.log(model.vocab_size))
    return UncertainTail(model, aggregate="mean", **{"eta": middle, **thresholds})


def stages(pair: Pair) -> list[Any]:
    return [power(pair.surrogate, BETA), power(pair.target, ALPHA)]


def suffix(pair: Pair, kind: type[Suffix] = Suffix, model: Any = None) -> Suffix:
    return kind(model or pair.surrogate.model, pair.space, Length(), 1 / BETA)


def _rule(kind: type[DelayedAcceptance], gated: bool = False) -> Any:
    """One kind of kernel around the surrogate's suffix proposal, and the production kernel."""

    def build(make: type[DelayedAcceptance]) -> Callable[[Pair], Kernel[Any]]:
        return lambda pair: make(stages(pair), suffix(pair), gate(pair) if gated else None)

    return build(kind), build(DelayedAcceptance)


def _tail_in(place: str, kind: type[Suffix]) -> Any:
    """A choice by the cut in one place, made by a proposal that lets it see the current tail."""

    def build(make: type[Suffix]) -> Callable[[Pair], Kernel[Any]]:
        def kernel(pair: Pair) -> Kernel[Any]:
            models = ByCut([pair.surrogate.model, pair.target.model], ByParity((0, 1)))
            screens = ByCut([power(pair.surrogate, BETA), power(pair.surrogate, 0.5)], ByParity((0, 1)))
            q = suffix(pair, make, models if place == "generator" else None)
            chosen = gate(pair, eta=ByParity((0.2, 10.0))) if place == "thresholds" else None
            first, target = stages(pair)
            return DelayedAcceptance([screens if place == "stage" else first, target], q, chosen)

        return kernel

    return build(kind), build(Suffix)


def _substitution(kind: type[Substitution], tokens: int = 2, screened: bool = True) -> Any:
    """A substitution by the target's own model, with a plain suffix move so that it can be irreducible."""

    def build(make: type[Substitution]) -> Callable[[Pair], Kernel[Any]]:
        def kernel(pair: Pair) -> Kernel[Any]:
            q = make(pair.target.model, pair.space, tokens, 0.7)
            target = stages(pair)[1]
            own = DelayedAcceptance(stages(pair), q) if screened else Metropolis(target, q)
            return Mixture([own, pair.target.metropolis(ALPHA, temperature=0.5)], [0.7, 0.3])

        return kernel

    return build(kind), build(Substitution)


def _case(twins: Any, *found_by: str) -> Mutant:
    return Mutant(*twins, frozenset(found_by))


BOTH = ("invariant", "reversible")

MUTANTS = {
    "gate on the proposal only": _case(_rule(GateOfTheProposal, gated=True), *BOTH),
    "second stage alone for gated pairs": _case(_rule(SecondStageAlone, gated=True), *BOTH),
    "ratio of the proposals in both stages": _case(_rule(HastingsTwice), *BOTH),
    "cut ratio in both stages": _case(_rule(CutRatioTwice), *BOTH),
    "second stage skipped": _case(_rule(NoSecondStage), *BOTH),
    "current tail scored under another prefix": _case(_rule(AnotherPrefix), *BOTH),
    "exponent adapted after warm-up": _case(_rule(GoesOnAdapting), "carries_state"),
    "thresholds see the tail": _case(_tail_in("thresholds", CutShowsTheTail), *BOTH),
    "stage chosen by the tail": _case(_tail_in("stage", CutShowsTheTail), *BOTH),
    "generator chosen by the tail": _case(_tail_in("generator", GeneratorSeesTheTail), *BOTH),
    "substitution notices no end": _case(_substitution(NoticesNoEnd), "enumeration"),
    "substitution may draw an end": _case(_substitution(EndMayBeDrawn), *BOTH),
    "substitution not normalised": _case(_substitution(NotNormalised), *BOTH),
    "substitution keeps old scores": _case(
        _substitution(KeepsOldScores, tokens=1, screened=False), *BOTH, "carries_state"
    ),
}

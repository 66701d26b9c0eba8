"""Wrong kernels, each the production kernel with one correction dropped or bent: what the harness must catch.

All are faults seen in published samplers or easily made. Each is built from a toy beside its right twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from powermc.kernels import Metropolis, Mixture
from powermc.proposals import Independent, RandomWalk
from powermc.sequences import Entropy, Length, Path, Suffix
from powermc.targets import Table
from powermc.testing.strategies import Toy
from powermc.types import Kernel, Move, State, evaluate

ALPHA = 2.0


# Terms of the ratio


class NoCutRatio(Suffix):
    """Leaves C(m | x') / C(m | x) out."""

    def log_hastings(self, x, y, m):
        return self.log_q(x, m) - self.log_q(y, m)


class NoLogZ(Suffix):
    """Takes the tempered tail for normalised: log q = log p / T."""

    def log_q(self, path, m):
        return float(path.log_p[m:].sum() / self.temperature)


class WrongSign(Suffix):
    """log q(y | x) - log q(x | y)."""

    def log_hastings(self, x, y, m):
        return -super().log_hastings(x, y, m)


class SlicedTail(Suffix):
    """Slices the current tail to the proposal's length, in p^alpha and in q: its last terms vanish from the ratio.

    At T = 1 / alpha the terms are log Z <= 0, and moves that shrink a path are often accepted with or without them:
    on `peaked` always, so there it is found at T = 1 only.
    """

    def log_hastings(self, x, y, m):
        n = len(y)
        dropped = float(x.log_p[n:].sum()), self.log_q(x, min(n, len(x)))
        return super().log_hastings(x, y, m) + ALPHA * dropped[0] - dropped[1]


class SlicedProposalTerm(Suffix):
    """The same in q only."""

    def log_hastings(self, x, y, m):
        return super().log_hastings(x, y, m) - self.log_q(x, min(len(y), len(x)))


class TailEntropy(Suffix):
    """Normalises the entropy law over the tail from m on, as if the shared prefix cancelled."""

    def log_hastings(self, x, y, m):
        ratio = math.log(x.entropy[m:].sum()) - math.log(y.entropy[m:].sum())
        return self.log_q(x, m) - self.log_q(y, m) + ratio


class NotTheLastEntropy(Suffix):
    """Sums the entropies without the step that emitted the end token, in the ratio only."""

    def log_hastings(self, x, y, m):
        sums = [z.entropy[: len(z) - z.finished].sum() for z in (x, y)]
        if not all(s > 0 for s in sums):
            return -math.inf
        return self.log_q(x, m) - self.log_q(y, m) + math.log(sums[0]) - math.log(sums[1])


class AnyLogZ(Suffix):
    """Takes the log Z that the path happens to have, at whatever temperature it was drafted."""

    def propose(self, choices, value):
        if value.log_z:
            z = next(iter(value.log_z.values()))
            value = value.with_scores(
                value.by, value.log_p, value.entropy, value.margin, {1 / self.temperature: z}, value.cache
            )
        return (yield from super().propose(choices, value))


# Lengths and ends


class CappedLength(Suffix):
    """Draws no more tokens than the current path has; a proposal that has not ended by then is thrown away."""

    def propose(self, choices, value):
        capped = Suffix(self.model, replace(self.space, horizon=len(value)), self.cuts, self.temperature)
        move = yield from capped.propose(choices, value)
        if move.null or self.space.contains(move.value.tokens):
            return move
        return Move(move.origin, move.origin, null=True, info=move.info)


class CappedAndKept(Suffix):
    """Draws no more tokens than the current path has, and takes what it got for a whole path."""

    def propose(self, choices, value):
        capped = Suffix(self.model, replace(self.space, horizon=len(value)), self.cuts, self.temperature)
        return (yield from capped.propose(choices, value))


class EndIsAToken(Suffix):
    """Goes on drawing after the end token."""

    def propose(self, choices, value):
        endless = Suffix(self.model, replace(self.space, eos=frozenset(), stop=None), self.cuts, self.temperature)
        return (yield from endless.propose(choices, value))


class CountsBeyondTheEnd(Suffix):
    """Draws to the horizon, cuts at the first end token, but counts the tokens behind it in q and p^alpha."""

    def propose(self, choices, value):
        endless = Suffix(self.model, replace(self.space, eos=frozenset(), stop=None), self.cuts, self.temperature)
        move = yield from endless.propose(choices, value)
        if move.null:
            return move
        y: Path = move.value
        n = next(n for n in range(1, len(y) + 1) if n == len(y) or self.space.ends(y.tokens[:n]))
        cut = Path(y.prompt, y.tokens[:n], self.space.ends(y.tokens[:n])).with_scores(
            self.model, y.log_p[:n], y.entropy[:n], y.margin[:n], {e: z[:n] for e, z in y.log_z.items()}, None
        )
        beyond = ALPHA * float(y.log_p[n:].sum()) - self.log_q(y, n)
        hastings = self.log_hastings(move.origin, cut, move.info["cut"]) + beyond
        return Move(cut, move.origin, hastings, info=move.info)


@dataclass(frozen=True)
class EndLeftOut(Length):
    """Uniform on start..L-2 for a path that has ended: the end token is not counted."""

    def log_weights(self, path):
        return np.zeros(max(len(path) - path.finished - self.start, 0))


# The kernel around the proposal


class StaleDensity(Metropolis):
    """Accepts the value and keeps the old log density."""

    def step(self, choices, state):
        new, info = yield from super().step(choices, state)
        return State(new.value, state.log_density), info


class OneStreamForAllTokens(Suffix):
    """Draws every token of a tail for the same purpose: a stream gives them the same number."""

    def propose(self, choices, value):
        return (yield from super().propose(_SameIndex(choices), value))


class _SameIndex:
    def __init__(self, choices):
        self.choices = choices

    def at(self, purpose, index=0):
        return self.choices.at(purpose)


class SameNumberTwice(Metropolis):
    """Draws the level for the purpose that the cut was drawn for."""

    def step(self, choices, state):
        move = yield from self.proposal.propose(choices, state.value)
        if move.null:
            return State(move.origin, state.log_density), {}
        value, log_density = yield from evaluate(self.target, move.value)
        level = choices.at("cut").level()
        if level.below(log_density - state.log_density + move.log_hastings):
            return State(value, log_density), {}
        return State(move.origin, state.log_density), {}


class WeightsSeeTheState(Mixture):
    """Chooses the component by the length of the current path."""

    def step(self, choices, state):
        weights = [len(state.value), 1.0]
        return (yield from Mixture(self.kernels, weights).step(choices, state))


class SharedPurposeMixture(Mixture):
    """Hands its component the choices it has drawn from itself: nested, both draws give the same number."""

    def step(self, choices, state):
        component = choices.at("component").categorical(np.log(self.weights))
        return (yield from self.kernels[component].step(choices, state))


class LostOrigin(Metropolis):
    """Accepts with a density it did not complete: takes the proposed value's own for granted and never stores it."""

    def step(self, choices, state):
        new, info = yield from super().step(choices, state)
        return (new if info["accepted"] else State(new.value, new.log_density + 1e-3)), info


class AlphaTwice(Metropolis):
    """Accepts with pi^2 where pi is meant: a wrong exponent in the ratio, not in the declared target."""

    def step(self, choices, state):
        move = yield from self.proposal.propose(choices.at("proposal"), state.value)
        if move.null:
            return State(move.origin, state.log_density), {}
        value, log_density = yield from evaluate(self.target, move.value)
        if choices.at("accept").level().below(2 * (log_density - state.log_density) + move.log_hastings):
            return State(value, log_density), {}
        return State(move.origin, state.log_density), {}


# Plain spaces


class NoDegrees(RandomWalk):
    """Takes the walk for symmetric: leaves |N(x)| / |N(y)| out."""

    def propose(self, choices, value):
        move = yield from super().propose(choices, value)
        return replace(move, log_hastings=0.0)


class NoWeights(Independent):
    """Takes the fixed proposal for symmetric."""

    def propose(self, choices, value):
        move = yield from super().propose(choices, value)
        return replace(move, log_hastings=0.0)


VALUES = range(4)
TABLE = Table(dict(zip(VALUES, np.log([0.1, 0.2, 0.3, 0.4]), strict=True)))
PLAIN = {
    "random walk without degrees": (NoDegrees, RandomWalk, {0: [1, 2, 3], 1: [0], 2: [0, 3], 3: [0, 2]}.__getitem__),
    "independent without weights": (NoWeights, Independent, {0: 0.0, 1: 1.0, 2: 0.0, 3: -1.0}),
}


class Mutant(NamedTuple):
    """A wrong kernel and its right twin, as functions of a toy, and the assertions that find it on `peaked`."""

    wrong: Callable[[Toy], Kernel[Any]]
    right: Callable[[Toy], Kernel[Any]]
    found_by: frozenset[str]


def _proposal(kind: type[Suffix], cuts: Any = Length(), temperature: float = 0.5, right: Any = None) -> Any:
    def build(make: Callable[..., Suffix], law: Any) -> Callable[[Toy], Kernel[Any]]:
        def kernel(toy: Toy) -> Kernel[Any]:
            good = toy.metropolis(ALPHA, law, temperature)
            q = good.proposal
            assert isinstance(q, Suffix)
            return replace(good, proposal=make(q.model, q.space, q.cuts, q.temperature))

        return kernel

    return build(kind, cuts), build(Suffix, right or cuts)


def _kernel(kind: type[Metropolis]) -> Any:
    def wrong(toy: Toy) -> Kernel[Any]:
        good = toy.metropolis(ALPHA, temperature=0.5)
        return kind(good.target, good.proposal)

    return wrong, lambda toy: toy.metropolis(ALPHA, temperature=0.5)


def _mixture(kind: type[Mixture] = Mixture, proposal: type[Suffix] = Suffix, nested: bool = False) -> Any:
    def build(make: type[Mixture], suffix: type[Suffix]) -> Callable[[Toy], Kernel[Any]]:
        def kernel(toy: Toy) -> Kernel[Any]:
            target = toy.metropolis(ALPHA).target
            parts = [Metropolis(target, suffix(toy.model, toy.space, Length(), t)) for t in (0.25, 2.0)]
            mixture = make(parts, [0.7, 0.3])
            return make([mixture, parts[0]], [0.5, 0.5]) if nested else mixture

        return kernel

    return build(kind, proposal), build(Mixture, Suffix)


def _case(twins: Any, *found_by: str) -> Mutant:
    return Mutant(*twins, frozenset(found_by))


MUTANTS = {
    "missing cut ratio": _case(_proposal(NoCutRatio), "invariant", "reversible"),
    "missing log Z": _case(_proposal(NoLogZ), "invariant", "reversible"),
    "wrong sign of the Hastings term": _case(_proposal(WrongSign, temperature=1.0), "invariant", "reversible"),
    "capped at the current length": _case(_proposal(CappedLength), "invariant", "reversible", "irreducible"),
    "capped and kept": _case(_proposal(CappedAndKept), "enumeration"),
    "tail sliced to the proposal's length": _case(_proposal(SlicedTail, temperature=1.0), "invariant", "reversible"),
    "tail sliced in q only": _case(_proposal(SlicedProposalTerm, temperature=1.0), "invariant", "reversible"),
    "end token not absorbing": _case(_proposal(EndIsAToken), "enumeration"),
    "counts tokens beyond the end": _case(_proposal(CountsBeyondTheEnd), "invariant", "reversible"),
    "end token left out of the length": _case(_proposal(Suffix, EndLeftOut(), right=Length()), "irreducible"),
    "entropy summed over the tail only": _case(_proposal(TailEntropy, Entropy()), "invariant", "reversible"),
    "entropy without the last step": _case(
        _proposal(NotTheLastEntropy, Entropy()), "invariant", "reversible", "irreducible"
    ),
    "log density not updated on acceptance": _case(_kernel(StaleDensity), "carries_state"),
    "one stream for all tokens": _case(_proposal(OneStreamForAllTokens), "enumeration"),
    "cut and level from one purpose": _case(_kernel(SameNumberTwice), "enumeration"),
    "nested mixtures share a purpose": _case(_mixture(SharedPurposeMixture, nested=True), "enumeration"),
    "mixture weights see the state": _case(_mixture(WeightsSeeTheState), "invariant", "reversible"),
    "rejection spoils the density": _case(_kernel(LostOrigin), "carries_state"),
    "log Z of another temperature": _case(_mixture(proposal=AnyLogZ), "carries_state"),
    "exponent applied twice": _case(_kernel(AlphaTwice), "invariant", "reversible"),
}

"""Wrong early rejections, each the production code with one term of the bound or one condition dropped or bent.

They are wrong in one way only: a draft that the plain rule would accept is abandoned now and then. So pi P = pi alone
may miss one (the loss can be symmetric), and P_fast = P_plain finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from powermc.bounds import Bound, Floor, abandoned, proposed
from powermc.kernels import DelayedAcceptance, Metropolis
from powermc.sequences import ByCut, Entropy, Length, SequenceProbability, Suffix, UncertainTail
from powermc.sequences.ceiling import Ceiling
from powermc.sequences.cuts import log_most
from powermc.targets import Power, Tilted
from powermc.testing.pairs import ByParity, Pair
from powermc.types import Kernel, State


class Bent(Suffix):
    """A suffix proposal whose ceiling can be bent; as it stands it is the production one."""

    def propose_above(self, choices, value, floor):
        return self._propose(choices, value, floor)

    def _ceiling(self, floor, model, x, cut):
        x, ceiling = yield from super()._ceiling(floor, model, x, cut)
        if ceiling is not None:
            self.bend(ceiling, x, cut.position)
        return x, ceiling

    def bend(self, ceiling: Ceiling, x: Any, m: int) -> None:
        pass


class NoLogZOfTheCurrent(Bent):
    """Takes the tempered current tail for normalised: its log Z is missing in w(x)."""

    def bend(self, ceiling, x, m):
        ceiling.total += float(x.log_z[1 / self.temperature][m:].sum())


class NoCutOfTheCurrent(Bent):
    """Leaves log C(m | x) out of the floor, as if it were 0."""

    def bend(self, ceiling, x, m):
        ceiling.total += self.log_cut(x, m)


class PrefixTwice(Bent):
    """Counts p^a of the shared prefix against the draft, though it cancels."""

    def bend(self, ceiling, x, m):
        ceiling.total += float(x.log_p[:m].sum())


class LateLogP(Bent):
    """Takes the exponent a for a - e: the tokens drawn count as if q had not preferred them."""

    def bend(self, ceiling, x, m):
        ceiling.excess += 1 / self.temperature


class AtTheEndToo(Bent):
    """Asks at a complete draft as well, by the supremum over paths that go on."""

    def propose_above(self, choices, value, floor):
        move = yield from self._propose(choices, value, floor)
        if move.null or move.bound is not None:
            return move
        y, m = move.value, move.auxiliary.position
        log_ratio = floor.target(move.auxiliary).log_density(y) - floor.log_density + move.log_hastings
        bound = log_ratio - self.log_cut(y, m) + log_most(self.cuts, m, len(y), None)
        return move if floor.level.below(bound) else replace(move, value=move.origin, bound=bound)


class Unconditional(Bent):
    """Bounds whatever the exponents are: each increment is taken to be <= 0 though it is not."""

    def _falls(self, bound):
        return True


# Cut laws


class TooSmall(Length):
    """-log(n + 2) for a draft of which n tokens are there: it may end with the next."""

    def log_most(self, cut, length, entropy):
        return super().log_most(cut, length + 1, entropy)


class CutTwice(Length):
    """Counts the supremum twice."""

    def log_most(self, cut, length, entropy):
        return 2 * super().log_most(cut, length, entropy)


class LastTwice(Entropy):
    """Counts the entropy of the last token twice in the sum that h_m is divided by."""

    def log_most(self, cut, length, entropy):
        return super().log_most(cut, length, [*entropy, entropy[-1]])


# Targets


class NoSupremum(Tilted):
    """Leaves the reward's bound out, as if no reward were above 0."""

    def bound(self, model):
        return Tilted(self.base, self.reward, 0.0).bound(model)


class AnyModel(SequenceProbability):
    """Takes log p of whatever model draws for its own."""

    def bound(self, model):
        return Bound(1.0, 0.0)


# Kernels


class Bounding(DelayedAcceptance):
    """Asks for a draft above a floor of its own, and decides on what comes back as the production kernel does."""

    def floor(self, auxiliary: Any) -> Any:
        return self.stages[0]

    def step(self, choices, state):
        level = choices.at("accept").level()
        floor = Floor(self.floor, level)
        move = yield from proposed(self.proposal, choices.at("proposal"), state.value, floor)
        if move.bound is not None:
            return State(move.origin, state.log_density), abandoned(move, level)
        return (yield from DelayedAcceptance(self.stages, _Made(move), self.gate).step(_First(choices, level), state))


@dataclass(frozen=True)
class _Made:
    """Proposes the move that has been made."""

    move: Any
    fields = MappingProxyType({})

    def propose(self, choices, value):
        return self.move
        yield


@dataclass(frozen=True)
class _First:
    """Choices of which the first level has been drawn."""

    choices: Any
    first: Any

    def at(self, purpose, index=0):
        return self if (purpose, index) == ("accept", 0) else self.choices.at(purpose, index)

    def level(self):
        return self.first


class GateIgnored(Bounding):
    """Abandons by the ratio of stage 1 under a gate too, where the pair may be one that r alone decides."""


class FirstOption(Bounding):
    """Bounds by the first of several surrogates, whichever the cut chooses."""

    def floor(self, auxiliary):
        return self.stages[0].options[0]


class Mutant(NamedTuple):
    """A wrong kernel and its right twin, as functions of a pair; plain kernels use its target only."""

    wrong: Callable[[Pair], Kernel[Any]]
    right: Callable[[Pair], Kernel[Any]]


def metropolis(
    kind: type[Suffix] = Suffix,
    cuts: Any = Length(),
    *,
    alpha: float = 2.0,
    temperature: float = 0.5,
    tilt: Any = None,
    base: Any = SequenceProbability,
    drawn_by: str = "target",
) -> Callable[[Pair], Kernel[Any]]:
    """Plain Metropolis-Hastings with any part replaced."""

    def kernel(pair: Pair) -> Kernel[Any]:
        power = Power(base(pair.target.model), alpha)
        q = kind(getattr(pair, drawn_by).model, pair.space, cuts, temperature)
        return Metropolis(power if tilt is None else tilt(power), q)

    return kernel


def delayed(
    kind: type[DelayedAcceptance] = DelayedAcceptance, *, gate: bool = False, by_cut: bool = False
) -> Callable[[Pair], Kernel[Any]]:
    """The usual choice of generator and surrogate; `by_cut`: its power 4 or 2, by the cut."""

    def kernel(pair: Pair) -> Kernel[Any]:
        own, target = (SequenceProbability(toy.model) for toy in (pair.surrogate, pair.target))
        screen = ByCut([Power(own, 4.0), Power(own, 2.0)], ByParity((0, 1))) if by_cut else Power(own, 2.0)
        q = Suffix(pair.surrogate.model, pair.space, Length(), 0.5)
        unsure = UncertainTail(pair.surrogate.model, eta=0.9) if gate else None
        return kind([screen, Power(target, 2.0)], q, unsure)

    return kernel


def bonus(path: Any) -> float:
    """A reward of up to 3 nats, for tokens that a draft may yet come to."""
    return float(path.tokens.count(0))


def _bent(kind: type[Suffix], **options: Any) -> Mutant:
    return Mutant(metropolis(kind, **options), metropolis(**options))


MUTANTS = {
    "log Z of the current tail missing": _bent(NoLogZOfTheCurrent),
    "log C(m | x) missing": _bent(NoCutOfTheCurrent),
    "prefix not cancelled": _bent(PrefixTwice),
    "log p of the tail at full power": _bent(LateLogP),
    "asked at the end too": _bent(AtTheEndToo, temperature=1.0),
    "e over alpha": _bent(Unconditional, temperature=0.25),
    "e under 1": _bent(Unconditional, temperature=2.0),
    "alpha under 1, e = alpha": _bent(Unconditional, alpha=0.5, temperature=2.0),
    "alpha under 1, e over it": _bent(Unconditional, alpha=0.5, temperature=1.0),
    "sup log C too small": Mutant(metropolis(cuts=TooSmall()), metropolis()),
    "sup log C twice": Mutant(metropolis(cuts=CutTwice()), metropolis()),
    "sup log C of entropy too small": Mutant(
        metropolis(cuts=LastTwice(), temperature=1.0), metropolis(cuts=Entropy(), temperature=1.0)
    ),
    "reward's supremum missing": Mutant(
        metropolis(tilt=lambda base: NoSupremum(base, bonus, 3.0)),
        metropolis(tilt=lambda base: Tilted(base, bonus, 3.0)),
    ),
    "log p of another model": Mutant(metropolis(base=AnyModel, drawn_by="surrogate"), metropolis(drawn_by="surrogate")),
    "gate ignored": Mutant(delayed(GateIgnored, gate=True), delayed(gate=True)),
    "surrogate of another cut": Mutant(delayed(FirstOption, by_cut=True), delayed(by_cut=True)),
}

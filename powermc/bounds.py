"""What early rejection is made of: bounds of log densities, and the floor that a draft must stay above.

A kernel that draws its level u first can tell a proposal what will be asked of the draft. A proposal made piece by
piece may then stop as soon as a bound of its log ratio shows that u rejects it whatever follows: the same chain, the
same law, fewer pieces (design section 4, item 4). What a piece is, this module does not know.

Everything here is optional. A target, cut law or proposal that says nothing of bounds is never rejected early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, cast

from powermc.types import Choices, Info, Level, Move, Proposal, Steps, Target, X


class Bound(NamedTuple):
    """log pi(x) <= exponent * log p(x) + rest for every x, in nats, p being a model that the asker names.

    A target says so by a method `bound(model) -> Bound | None`; None: no such bound is known.
    """

    exponent: float
    rest: float


def bound_of(target: Any, model: Any) -> Bound | None:
    """What `target` says of itself beside log p of this very model (models are compared by identity)."""
    return target.bound(model) if claims(target, "bound", "log_density") else None


def weighted(*terms: tuple[float, Bound | None]) -> Bound | None:
    """The bound of a sum of log densities, each times a number >= 0; None if one of them has no bound."""
    exponent, rest = 0.0, 0.0
    for weight, bound in terms:
        if bound is None:
            return None
        exponent += weight * bound.exponent
        rest += weight * bound.rest if weight else 0.0  # 0 * -inf
    return Bound(exponent, rest)


def claims(thing: Any, claim: str, *about: str) -> bool:
    """Whether `thing` has the method `claim`, and none of `about` has been overridden beneath it.

    A bound that is inherited says nothing of the density, law or ratio of a subclass that has its own.
    """
    return _claims(type(thing), claim, about)


@lru_cache(maxsize=1024)  # asked for every token of every draft
def _claims(kind: type, claim: str, about: tuple[str, ...]) -> bool:
    classes = (vars(base) for base in kind.__mro__)
    return next((claim in own for own in classes if any(name in own for name in (claim, *about))), False)


@dataclass(frozen=True, slots=True)
class Floor(Generic[X]):
    """What a draft y from x is rejected by: u >= r, log r = log g(y) - log g(x) + log q(x | y) - log q(y | x).

    `target` gives g for the move's auxiliary; `level` is u, which has been drawn; `log_density` is log g(x) in nats, or
    None where it has yet to be evaluated.
    """

    target: Callable[[Any], Target[X]]
    level: Level
    log_density: float | None = None


class Abandoning(Protocol[X]):
    """A `Proposal` that can see before its draft is complete that it will be rejected."""

    def propose_above(self, choices: Choices, value: X, floor: Floor[X]) -> Steps[Move[X]]:
        """`propose`, with leave to abandon the draft: `Move.bound` is then a bound of log r that `floor.level` is not
        below, and the move's value is its origin. Must draw as `propose` does, and never abandon what it would accept.
        """
        ...


def proposed(proposal: Proposal[X], choices: Choices, value: X, floor: Floor[X] | None) -> Steps[Move[X]]:
    """A move of `proposal`, above the floor if there is one and the proposal can make use of it."""
    if floor is None or not claims(proposal, "propose_above", "propose"):
        return proposal.propose(choices, value)
    return cast("Abandoning[X]", proposal).propose_above(choices, value, floor)


def abandoned(move: Move[X], level: Level) -> Info:
    """The info of an abandoned draft: rejected by a level that is not below the bound."""
    outcome = {"accepted": False, "changed": False, "null": False, "abandoned": True}
    ratio = math.nan if move.bound is None else move.bound
    return {**outcome, "log_ratio": ratio, "log_level": level.log_u, **move.info}

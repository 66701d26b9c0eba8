"""Metropolis-Hastings, for any target and any proposal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from powermc.bounds import Floor, abandoned, proposed
from powermc.types import Choices, Field, Fields, Info, Move, Proposal, State, Steps, Target, X, evaluate, start

ACCEPTANCE: Fields = {
    "accepted": Field("bool", False),
    "changed": Field("bool", False),
    "null": Field("bool", False),
    "abandoned": Field("bool", False),
    "log_ratio": Field("float64", float("nan")),
    "log_level": Field("float64", float("nan")),
}


def stayed(move: Move[X]) -> Info:
    """The info of a null move."""
    return {"accepted": False, "changed": False, "null": True, **move.info}


@dataclass(frozen=True)
class Metropolis(Generic[X]):
    """Accept y from x with probability min(1, r), log r = log pi(y) - log pi(x) + log q(x | y) - log q(y | x).

    Metropolis et al. 1953, Hastings 1970. Reversible with respect to the target for every proposal whose
    `log_hastings` is right; irreducible only if the proposal reaches the whole support.
    With `early_rejection` a proposal may abandon a draft that u, drawn first, is seen to reject: the same chain, number
    for number (`powermc.bounds`).

    Info: `accepted`; `changed` (accepted and the value differs: accepted moves to the same value flatter the rate);
    `null` (the move could not be made from here); `abandoned`; `log_ratio` (log r, abandoned: the bound of it) and
    `log_level` (log u), nats.
    """

    target: Target[X]
    proposal: Proposal[X]
    early_rejection: bool = True

    @property
    def fields(self) -> Fields:
        return {**ACCEPTANCE, **self.proposal.fields}

    def init(self, value: X) -> Steps[State[X]]:
        return start(self.target, value)

    def step(self, choices: Choices, state: State[X]) -> Steps[tuple[State[X], Info]]:
        level = choices.at("accept").level()
        floor = Floor(lambda _: self.target, level, state.log_density) if self.early_rejection else None
        move = yield from proposed(self.proposal, choices.at("proposal"), state.value, floor)
        here = State(move.origin, state.log_density)
        if move.null:
            return here, stayed(move)
        if move.bound is not None:
            return here, abandoned(move, level)
        value, log_density = yield from evaluate(self.target, move.value)
        log_ratio = log_density - state.log_density + move.log_hastings
        accepted = level.below(log_ratio)
        info = {
            "accepted": accepted,
            "changed": accepted and value != move.origin,
            "null": False,
            "log_ratio": log_ratio,
            "log_level": level.log_u,
            **move.info,
        }
        return (State(value, log_density) if accepted else here), info

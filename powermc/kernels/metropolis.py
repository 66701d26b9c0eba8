"""Metropolis-Hastings, for any target and any proposal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from powermc.types import Choices, Field, Fields, Info, Move, Proposal, State, Steps, Target, X, evaluate, start

ACCEPTANCE: Fields = {
    "accepted": Field("bool", False),
    "changed": Field("bool", False),
    "null": Field("bool", False),
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

    Info: `accepted`; `changed` (accepted and the value differs: accepted moves to the same value flatter the rate);
    `null` (the move could not be made from here); `log_ratio` and `log_level` (log r and log u, nats).
    """

    target: Target[X]
    proposal: Proposal[X]

    @property
    def fields(self) -> Fields:
        return {**ACCEPTANCE, **self.proposal.fields}

    def init(self, value: X) -> Steps[State[X]]:
        return start(self.target, value)

    def step(self, choices: Choices, state: State[X]) -> Steps[tuple[State[X], Info]]:
        move = yield from self.proposal.propose(choices.at("proposal"), state.value)
        here = State(move.origin, state.log_density)
        if move.null:
            return here, stayed(move)
        value, log_density = yield from evaluate(self.target, move.value)
        log_ratio = log_density - state.log_density + move.log_hastings
        level = choices.at("accept").level()
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

"""Delayed acceptance: cheap stages turn a proposal down before an expensive one is asked about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, runtime_checkable

from powermc.bounds import Floor, abandoned, proposed
from powermc.errors import ArgumentError
from powermc.kernels.metropolis import ACCEPTANCE, stayed
from powermc.types import Choices, Field, Fields, Info, Proposal, State, Steps, Target, X, X_in, evaluate, start


@runtime_checkable
class Conditional(Protocol[X_in]):
    """A surrogate that depends on what a move and its reverse share (`Move.auxiliary`), and on nothing else."""

    def given(self, auxiliary: Any, /) -> Target[X_in]:
        """The surrogate to use for all moves of this auxiliary."""
        ...


class Gate(Protocol[X]):
    """Says of one value at a time whether the surrogates can be relied on for it.

    The kernel asks for both values of a pair and takes *or*, so that what it does is symmetric whatever a gate does:
    a gate sees one value and the auxiliary, never the other value, nor which of the two is the current one.
    """

    def uncertain(self, value: X, auxiliary: Any) -> Steps[tuple[X, bool]]:
        """Complete `value` as far as needed; return it, and whether it is uncertain. A pure function of both."""
        ...


@dataclass(frozen=True)
class DelayedAcceptance(Generic[X]):
    """Accept y from x if it passes every stage. With surrogates g_1, ..., g_{k-1} and g_k = pi, stage i is passed with
    probability min(1, a_i), where (h = log q(x | y) - log q(y | x), every factor of the proposal in it)

        log a_1 = log g_1(y) - log g_1(x) + h
        log a_i = [log g_i(y) - log g_i(x)] - [log g_{i-1}(y) - log g_{i-1}(x)],    i = 2, ..., k.

    Christen & Fox 2005 (k = 2); Banterle et al. 2015 (any k). Each a_i(y, x) = 1 / a_i(x, y), and their product is the
    ratio r of `Metropolis`: so the kernel is reversible with respect to pi whatever the surrogates are, and its
    probability of moving from x to y is at most that of `Metropolis` (Peskun). It pays only per unit of cost: g_i is
    not evaluated before stage i - 1 is passed. Irreducible if `Metropolis` is and every g_i is positive wherever pi
    is; where a surrogate vanishes its moves are rejected (-inf - (-inf) rejects), so mix in plain `Metropolis`.

    With a gate, a pair of which either value is uncertain is decided by r alone: `Metropolis` on those pairs, stages
    on the others. Being gated is a symmetric function of the pair (given the auxiliary), so this too is reversible.

    Parameters
    ----------
    stages
        The surrogates, cheap ones first, then the target. A surrogate may be `Conditional` on the move's auxiliary.
    proposal, gate
        Its auxiliary, if stages or gate use it, must be a function of nothing but what both directions share.

    A proposal equal to x is accepted as it is, no stage asked. With `early_rejection` a draft that stage 1 will reject
    may be abandoned, as in `Metropolis`; not under a gate, which decides only when both tails are known.

    Info: that of `Metropolis`, with `log_ratio` and `log_level` those of the stage that came closest to a tie; `gated`;
    `same` (the proposal was x itself); `stage` (how many stages were passed; -1: gated, same or null);
    `stage1_accepted` (False for those); `log_surrogate` = log g_1(y) - log g_1(x), `log_stage1` = log a_1 (NaN for
    those and abandoned drafts); `log_target` = log pi(y) - log pi(x) (NaN where the target was not reached).
    """

    stages: Sequence[Target[X] | Conditional[X]]
    proposal: Proposal[X]
    gate: Gate[X] | None = None
    early_rejection: bool = True

    def __post_init__(self) -> None:
        if not self.stages:
            raise ArgumentError("DelayedAcceptance needs at least one stage, the target; got none")
        if isinstance(self.stages[-1], Conditional):
            raise ArgumentError(f"the last stage is the target and cannot depend on the move, got {self.stages[-1]!r}")

    @property
    def target(self) -> Target[X]:
        """The last stage."""
        return self.stages[-1]  # type: ignore[return-value]  # checked above

    @property
    def fields(self) -> Fields:
        return {**ACCEPTANCE, **_STAGES, **self.proposal.fields}

    def init(self, value: X) -> Steps[State[X]]:
        return start(self.target, value)

    def step(self, choices: Choices, state: State[X]) -> Steps[tuple[State[X], Info]]:
        floor, gated = None, False
        if self.early_rejection and self.gate is None:
            here = state.log_density if len(self.stages) == 1 else None
            floor = Floor(partial(_at, self.stages[0]), choices.at("accept").level(), here)
        move = yield from proposed(self.proposal, choices.at("proposal"), state.value, floor)
        x, y, auxiliary = move.origin, move.value, move.auxiliary
        if move.null:
            return State(x, state.log_density), stayed(move)
        if floor is not None and move.bound is not None:
            return State(x, state.log_density), {**abandoned(move, floor.level), **_FAILED}
        if y == x:  # every a_i is 1, so nothing needs to be evaluated to stay
            kept: Info = {"accepted": True, "changed": False, "null": False, "gated": False, "same": True}
            return State(x, state.log_density), {**kept, **move.info}
        if self.gate is not None:
            x, gated = yield from self.gate.uncertain(x, auxiliary)
            if not gated:
                y, gated = yield from self.gate.uncertain(y, auxiliary)
        stages = self.stages[-1:] if gated else self.stages
        info: Info = {"null": False, "gated": gated, "log_ratio": math.nan, "log_level": math.nan, **move.info}
        passed, before, there = 0, -move.log_hastings, math.nan
        for i, stage in enumerate(stages):
            if i == len(stages) - 1:
                stage, here = self.target, state.log_density
            else:
                stage = _at(stage, auxiliary)
                x, here = yield from evaluate(stage, x)
            y, there = yield from evaluate(stage, y)
            change = there - here
            log_ratio, level = change - before, floor.level if floor and not i else choices.at("accept", i).level()
            if i == 0 or abs(level.log_u - log_ratio) < abs(info["log_level"] - info["log_ratio"]):
                info |= {"log_ratio": log_ratio, "log_level": level.log_u}
            if i == 0 and not gated:
                info |= {"log_surrogate": change, "log_stage1": log_ratio}
            if i == len(stages) - 1:
                info["log_target"] = change
            if not level.below(log_ratio):
                break
            passed, before = passed + 1, change
        accepted = passed == len(stages)
        if not gated:
            info |= {"stage": passed, "stage1_accepted": passed > 0}
        info |= {"accepted": accepted, "changed": accepted and y != x}
        return (State(y, there) if accepted else State(x, state.log_density)), info


def _at(stage: Target[X] | Conditional[X], auxiliary: Any) -> Target[X]:
    return stage.given(auxiliary) if isinstance(stage, Conditional) else stage


_FAILED = {"gated": False, "stage": 0, "stage1_accepted": False}
_STAGES: Fields = {
    **dict.fromkeys(("gated", "same", "stage1_accepted"), Field("bool", False)),
    "stage": Field("int8", -1),
    **dict.fromkeys(("log_surrogate", "log_stage1", "log_target"), Field("float64", float("nan"))),
}

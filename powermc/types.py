"""The vocabulary of the library: states, moves, requests, and the protocols everything is written against.

A kernel is written for *one* chain. Its step is a generator that yields `Request`s and is sent their answers;
`powermc.scheduling.drive` runs many such generators and batches their requests by oracle. Nothing here knows
what a value is (a number, a path of tokens), what answers a request, or that language models exist.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from powermc.errors import ZeroProbability

X = TypeVar("X")
X_in = TypeVar("X_in", contravariant=True)
T = TypeVar("T")


class Oracle(Protocol):
    """Something that answers the requests of many chains at once, such as a language model."""

    def answer(self, requests: Sequence[Any]) -> Sequence[Any]:
        """One answer per request, in order; at least one of them not `PENDING`.

        `PENDING` leaves a request for a later call (no free row, or cheaper work first). An answer that is a
        `ChainError` is raised inside the generator that asked.
        """
        ...


class Request:
    """A question to an oracle. Subclasses carry what is asked; that is between the asker and the oracle."""

    __slots__ = ()

    @property
    def oracle(self) -> Oracle:
        raise AttributeError(f"{type(self).__name__} does not name its oracle")


class _Pending:
    def __repr__(self) -> str:
        return "PENDING"


PENDING = _Pending()

_MOST_COMPLETIONS = 100

Steps: TypeAlias = Generator[Any, Any, T]
"""A computation that yields requests (and, in a chain's program, events), is sent answers, and returns a T."""

Info: TypeAlias = dict[str, Any]
"""What happened in one step; the names and dtypes are declared in `Kernel.fields`."""


class Field(NamedTuple):
    """Declaration of one entry of an `Info`: its NumPy dtype, and the value that stands for "not applicable"."""

    dtype: str
    fill: Any


Fields: TypeAlias = Mapping[str, Field]


@dataclass(frozen=True, slots=True)
class State(Generic[X]):
    """What the next step needs, and nothing else. `log_density` is log pi(value) in nats, up to one constant."""

    value: X
    log_density: float


@dataclass(frozen=True, slots=True)
class Move(Generic[X]):
    """A proposed value.

    `log_hastings` is log q(origin | value) - log q(value | origin), every factor of the proposal included (cut
    laws too). `origin` is the value moved from, possibly with more of it evaluated than before, so that the work is
    kept when the move is rejected. `null` marks a move that cannot be made from here: the chain stays, and counts it.
    `auxiliary` is what the forward and the reverse move share, such as the cut of a suffix proposal: stages and gates
    may depend on it (design section 3). `bound` is None but of an abandoned draft: see `powermc.bounds`.
    """

    value: X
    origin: X
    log_hastings: float = 0.0
    null: bool = False
    info: Info = field(default_factory=dict)
    auxiliary: Any = None
    bound: float | None = None


class Level(Protocol):
    """A uniform u on (0, 1) that is drawn once and compared any number of times."""

    @property
    def log_u(self) -> float:
        """log u in nats; NaN where u is not a number but an interval being enumerated."""
        ...

    def below(self, log_bound: float) -> bool:
        """Whether log u < log_bound. False for NaN, so that -inf - (-inf) rejects."""
        ...


class Choices(Protocol):
    """All randomness of a step.

    Draws from one object are independent of each other and of those at any other purpose. A `Choices` that has one
    may also offer `uniform() -> float`, for models that draw by inverse CDF where their logits are.
    """

    def at(self, purpose: str, index: int = 0) -> Choices:
        """The choices for one purpose; asked again with the same arguments it gives the same numbers."""
        ...

    def categorical(self, log_weights: np.ndarray) -> int:
        """An index drawn with probability proportional to exp(log_weights), by inverse CDF."""
        ...

    def integers(self, n: int) -> int:
        """An integer drawn uniformly from 0..n-1."""
        ...

    def level(self) -> Level:
        """A uniform level to compare bounds with."""
        ...


class Target(Protocol[X_in]):
    """An unnormalised log density over values of type X."""

    def log_density(self, value: X_in) -> float:
        """log pi(value) in nats, up to a constant shared by all values; -inf outside the support."""
        ...

    def missing(self, value: X_in) -> Request | None:
        """The request whose answer is `value` with more of it evaluated, or None when `log_density` can be taken."""
        ...


class Proposal(Protocol[X]):
    """A way to draw a new value given the current one."""

    @property
    def fields(self) -> Fields:
        """What its moves' `info` holds."""
        ...

    def propose(self, choices: Choices, value: X) -> Steps[Move[X]]:
        """Draw a move. A generator: requests are yielded, the `Move` is returned."""
        ...


class Kernel(Protocol[X]):
    """A Markov kernel. Every kernel here leaves its target invariant; `powermc.testing` proves it by enumeration."""

    @property
    def fields(self) -> Fields:
        """Names and dtypes of the `Info` that `step` returns."""
        ...

    def init(self, value: X) -> Steps[State[X]]:
        """The state that starts at `value`. Raises `ZeroProbability` outside the support of the target."""
        ...

    def step(self, choices: Choices, state: State[X]) -> Steps[tuple[State[X], Info]]:
        """One transition. A generator: requests are yielded, the new state and its info are returned."""
        ...


def evaluate(target: Target[X], value: X) -> Steps[tuple[X, float]]:
    """Complete `value` as far as `target` needs; return it with log pi(value).

    Raises `RuntimeError` for a target that is never satisfied by the answers it asked for.
    """
    for _ in range(_MOST_COMPLETIONS):
        request = target.missing(value)
        if request is None:
            return value, target.log_density(value)
        value = yield request
    raise RuntimeError(f"{target!r} still misses something of {value!r} after {_MOST_COMPLETIONS} answers")


def start(target: Target[X], value: X) -> Steps[State[X]]:
    """The state of a chain on `target` that starts at `value`; what most kernels return from `init`."""
    value, log_density = yield from evaluate(target, value)
    if not log_density > -math.inf:
        raise ZeroProbability(
            f"the initial value {value!r} has probability zero under the target; start from a value it supports"
        )
    return State(value, log_density)

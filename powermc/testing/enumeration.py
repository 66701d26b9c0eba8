"""Proof by enumeration: the production kernel, run once for every outcome of every random choice it makes.

`Script` is a `Choices` that follows a prescribed list of branches, takes the first branch beyond it, and remembers
what else it could have taken and with which probability. Running a step for all scripts gives its transition matrix
exactly (to rounding), through the very code that users run, scheduler and caches included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Generic, NamedTuple

import numpy as np

from powermc.errors import ZeroProbability
from powermc.scheduling import Failed, Finished, drive
from powermc.types import Choices, Info, Kernel, Level, State, Steps, T, X

_STRAYED = (
    "a run repeated with the same choices came to other ones, so its leaves cannot be counted: "
    "the kernel depends on something besides its state and choices, or on rounding"
)


class _Tape:
    """The branches taken in one run, in order."""

    def __init__(self, forced: tuple[int, ...]) -> None:
        self.forced = forced
        self.taken: list[tuple[int, list[float]]] = []
        self.probability = 1.0
        self.owners: dict[tuple, Script] = {}

    def decide(self, probabilities: list[float]) -> int:
        i = len(self.taken)
        possible = [b for b, p in enumerate(probabilities) if p > 0]
        branch = self.forced[i] if i < len(self.forced) else possible[0]
        assert branch in possible, _STRAYED
        self.taken.append((branch, probabilities))
        self.probability *= probabilities[branch]
        return branch

    def siblings(self) -> Iterator[tuple[int, ...]]:
        """The scripts that differ from this run first at a choice it was free to make."""
        assert len(self.taken) >= len(self.forced), _STRAYED
        prefix = tuple(branch for branch, _ in self.taken)
        for i in range(len(self.forced), len(self.taken)):
            branch, probabilities = self.taken[i]
            for other in range(branch + 1, len(probabilities)):
                if probabilities[other] > 0:
                    yield (*prefix[:i], other)


class Script:
    """An exhaustive `Choices`: follows one branch of the tree of all random choices.

    Raises `AssertionError` if two objects made for the same purpose are both drawn from: a production stream would
    give them the same numbers, and an enumerator that took them as independent would prove the wrong kernel.
    """

    def __init__(self, forced: tuple[int, ...] = ()) -> None:
        self._tape = _Tape(forced)
        self._purpose: tuple = ()

    @property
    def probability(self) -> float:
        """The product of the probabilities of all branches taken."""
        return self._tape.probability

    def siblings(self) -> list[tuple[int, ...]]:
        """The scripts to run next; each leaf of the tree is reached once."""
        return list(self._tape.siblings())

    def at(self, purpose: str, index: int = 0) -> Script:
        child = Script.__new__(Script)
        child._tape, child._purpose = self._tape, (*self._purpose, purpose, index)
        return child

    def _decide(self, probabilities: list[float]) -> int:
        owner = self._tape.owners.setdefault(self._purpose, self)
        assert owner is self, f"two draws share the purpose {self._purpose}: a stream would give both the same number"
        return self._tape.decide(probabilities)

    def categorical(self, log_weights: np.ndarray) -> int:
        log_weights = np.asarray(log_weights, dtype=np.float64)
        peak = log_weights.max()
        assert np.isfinite(peak), f"a categorical draw needs a finite largest log weight, got {peak}"
        weights = np.exp(log_weights - peak)
        return self._decide((weights / weights.sum()).tolist())

    def integers(self, n: int) -> int:
        assert n >= 1, f"integers(n) needs n >= 1, got {n}"
        return self._decide([1.0 / n] * n)

    def level(self) -> Level:
        return _IntervalLevel(self)


class _IntervalLevel:
    """u known only to lie in [low, high): each comparison that could go both ways splits the interval."""

    log_u = math.nan

    def __init__(self, script: Script) -> None:
        self._script, self._low, self._high = script, 0.0, 1.0

    def below(self, log_bound: float) -> bool:
        if math.isnan(log_bound):
            return False
        bound = math.exp(min(log_bound, 0.0))
        # A ratio of exactly 1 may come out as 1 - 1e-16 when a run is repeated in another batch: not a branch.
        if bound >= self._high * (1 - 1e-13):
            return True
        if bound <= self._low:
            return False
        below = (bound - self._low) / (self._high - self._low)
        if self._script._decide([below, 1.0 - below]) == 0:
            self._high = bound
            return True
        self._low = bound
        return False


class Outcome(NamedTuple, Generic[T]):
    """One leaf: what the computation returned, and the probability of getting there."""

    value: T
    probability: float


def enumerate_outcomes(
    programs: Sequence[Callable[[Choices], Steps[T]]], *, active: int = 512
) -> list[list[Outcome[T]]]:
    """Run every program for every outcome of its choices, many at a time through the scheduler.

    Returns one list of leaves per program; their probabilities sum to 1. A `ChainError` in any leaf is raised.
    """
    leaves: list[list[Outcome[T]]] = [[] for _ in programs]
    wave: list[tuple[int, tuple[int, ...]]] = [(i, ()) for i in range(len(programs))]
    while wave:
        scripts = [Script(forced) for _, forced in wave]
        running = (((n, i), programs[i](script)) for n, ((i, _), script) in enumerate(zip(wave, scripts, strict=True)))
        done: list[tuple[int, int, T]] = []
        for outcome in drive(running, active=active):
            if isinstance(outcome, Failed):
                raise outcome.error
            if isinstance(outcome, Finished):
                n, i = outcome.key  # type: ignore[misc]
                done.append((n, i, outcome.value))
        wave = []
        for n, i, value in sorted(done, key=lambda entry: entry[0]):
            leaves[i].append(Outcome(value, scripts[n].probability))
            wave.extend((i, forced) for forced in scripts[n].siblings())
    return leaves


@dataclass(frozen=True)
class Transitions(Generic[X]):
    """A kernel enumerated on a finite space.

    values: the n values the target supports. states: the state each starts from. log_density: shape (n,), nats.
    matrix: shape (n, n), matrix[i, j] = P(values[i] -> values[j]). leaves: every outcome of a step from each.
    """

    kernel: Kernel[X]
    values: list[X]
    states: list[State[X]]
    log_density: np.ndarray
    matrix: np.ndarray
    leaves: list[list[Outcome[tuple[State[X], Info]]]]

    @property
    def pi(self) -> np.ndarray:
        """The normalised target, shape (n,)."""
        weights = np.exp(self.log_density - self.log_density.max())
        return weights / weights.sum()


def enumerate_kernel(kernel: Kernel[X], space: Sequence[X], *, active: int = 512) -> Transitions[X]:
    """Run every outcome of one step of `kernel` from every value of `space` that its target supports.

    Raises `AssertionError` if a step reaches a value that is not in `space` or not supported.
    """
    values: list[X] = []
    states: list[State[X]] = []
    started: dict[Hashable, Any] = {}
    for outcome in drive(((i, kernel.init(value)) for i, value in enumerate(space)), active=active):
        if isinstance(outcome, Finished):
            started[outcome.key] = outcome.value
        elif isinstance(outcome, Failed) and not isinstance(outcome.error, ZeroProbability):
            raise outcome.error
    for i, value in enumerate(space):
        if i in started:
            values.append(value)
            states.append(started[i])
    assert values, "the target supports no value of the space"
    leaves = _leaves(kernel, states, active)
    matrix = _matrix(values, leaves)
    return Transitions(kernel, values, states, np.array([s.log_density for s in states]), matrix, leaves)


def _leaves(kernel: Kernel[X], states: Sequence[State[X]], active: int) -> list[list[Outcome[tuple[State[X], Info]]]]:
    return enumerate_outcomes([lambda choices, s=s: kernel.step(choices, s) for s in states], active=active)


def _matrix(values: Sequence[Any], leaves: Sequence[list[Outcome[tuple[State[Any], Info]]]]) -> np.ndarray:
    index = {value: i for i, value in enumerate(values)}
    assert len(index) == len(values), "the space lists a value twice"
    matrix = np.zeros((len(leaves), len(values)))
    for row, outcomes in zip(matrix, leaves, strict=True):
        for (state, _), probability in outcomes:
            assert state.value in index, f"a step reached {state.value!r}, which is not in the supported space"
            row[index[state.value]] += probability
    return matrix


def transition_matrix(kernel: Kernel[X], space: Sequence[X]) -> np.ndarray:
    """P with P[i, j] = probability of one step from the i-th to the j-th *supported* value of `space`."""
    return enumerate_kernel(kernel, space).matrix


def two_step_matrix(transitions: Transitions[X], *, active: int = 512) -> np.ndarray:
    """P_2[i, j]: two steps from value i, the second from the very state (caches and all) that the first returned.

    States that are equal down to the last bit take their second step once.
    """
    flat = [leaf for leaves in transitions.leaves for leaf in leaves]
    places: dict[Hashable, int] = {}
    place = [places.setdefault(_fingerprint(leaf.value[0]), len(places)) for leaf in flat]
    distinct: list[Any] = [None] * len(places)
    for leaf, i in zip(flat, place, strict=True):
        distinct[i] = leaf.value[0]
    second = _matrix(transitions.values, _leaves(transitions.kernel, distinct, active))
    weighted = second[place] * np.array([leaf.probability for leaf in flat])[:, None]
    bounds = np.cumsum([0, *(len(leaves) for leaves in transitions.leaves)])
    return np.array([weighted[a:b].sum(0) for a, b in pairwise(bounds)])


def _fingerprint(value: Any) -> Hashable:
    """Equal for two values only if no step could tell them apart: plain data by content, all else by identity.

    Oracles count by identity too: whose scores a path holds is asked with `is`.
    """
    kind: Any = type(value)
    if value is None or kind in (bool, int, str, bytes):
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind in (tuple, list):
        return kind, tuple(map(_fingerprint, value))
    if kind in (dict, MappingProxyType):
        return kind, tuple((_fingerprint(k), _fingerprint(v)) for k, v in value.items())
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return kind, value.dtype.str, value.shape, value.tobytes()
    if is_dataclass(value) and not isinstance(value, type) and not hasattr(value, "answer"):
        names = dict.fromkeys([*(f.name for f in fields(value)), *getattr(value, "__dict__", ())])
        return kind, tuple((name, _fingerprint(getattr(value, name))) for name in names)
    return kind, id(value)

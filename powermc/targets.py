"""Targets: log densities, and ways to make one out of others.

All are exact about -inf: outside the support of any factor the density is zero, and 0 * -inf is -inf, so that
alpha = 0 is uniform on the support of the base, not on everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from powermc.bounds import Bound, bound_of, weighted
from powermc.errors import ArgumentError
from powermc.types import Request, Target, X


def _check_exponent(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name} must be a finite number >= 0, got {value}")


def _scaled(exponent: float, log_density: float) -> float:
    return exponent * log_density if log_density > -math.inf else -math.inf


@dataclass(frozen=True)
class Table(Generic[X]):
    """A target given by its log weights (nats), one per value; values not in the table have probability zero.

    >>> Table({0: 0.0, 1: -1.0}).log_density(1)
    -1.0
    """

    log_weights: Mapping[X, float]

    def log_density(self, value: X) -> float:
        return self.log_weights.get(value, -math.inf)

    def missing(self, value: X) -> Request | None:
        return None

    def bound(self, model: Any) -> Bound:
        return Bound(0.0, max(self.log_weights.values(), default=-math.inf))


@dataclass(frozen=True)
class Power(Generic[X]):
    """log pi = alpha * log base, the power distribution p(x)^alpha (Karan & Du 2025, arXiv:2510.14901).

    Raises `ArgumentError` unless alpha is finite and >= 0.
    """

    base: Target[X]
    alpha: float

    def __post_init__(self) -> None:
        _check_exponent("alpha", self.alpha)

    def log_density(self, value: X) -> float:
        return _scaled(self.alpha, self.base.log_density(value))

    def missing(self, value: X) -> Request | None:
        return self.base.missing(value)

    def bound(self, model: Any) -> Bound | None:
        return weighted((self.alpha, bound_of(self.base, model)))


@dataclass(frozen=True)
class Product(Generic[X]):
    """log pi = sum of the factors' log densities: a product of experts."""

    factors: Sequence[Target[X]]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ArgumentError("Product needs at least one factor, got none")

    def log_density(self, value: X) -> float:
        total = 0.0
        for factor in self.factors:
            term = factor.log_density(value)
            if not term > -math.inf:
                return -math.inf
            total += term
        return total

    def missing(self, value: X) -> Request | None:
        return next((request for f in self.factors if (request := f.missing(value)) is not None), None)

    def bound(self, model: Any) -> Bound | None:
        return weighted(*((1, bound_of(factor, model)) for factor in self.factors))


@dataclass(frozen=True)
class Tempered(Generic[X]):
    """The geometric bridge log pi = (1 - beta) log reference + beta log target, 0 <= beta <= 1.

    Its support is the intersection of both supports at every beta, ends included, so that a ladder of betas lives on
    one space. For a ladder of powers of one model use `Power`.
    """

    reference: Target[X]
    target: Target[X]
    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ArgumentError(f"beta must lie in [0, 1], got {self.beta}")

    def log_density(self, value: X) -> float:
        low, high = self.reference.log_density(value), self.target.log_density(value)
        if not (low > -math.inf and high > -math.inf):
            return -math.inf
        return (1 - self.beta) * low + self.beta * high

    def missing(self, value: X) -> Request | None:
        request = self.reference.missing(value)
        return self.target.missing(value) if request is None else request

    def bound(self, model: Any) -> Bound | None:
        return weighted((1 - self.beta, bound_of(self.reference, model)), (self.beta, bound_of(self.target, model)))


@dataclass(frozen=True)
class Tilted(Generic[X]):
    """log pi = log base + reward(x): a reward-tilted or, with a reward of 0 or -inf, a constrained target.

    `reward` is a pure function of the value, in nats. It is called only on values that the base supports. `at_most`, a
    bound of it, lets drafts be rejected early. Raises `ArgumentError` when it returns NaN, +inf or more than `at_most`.
    """

    base: Target[X]
    reward: Callable[[X], float]
    at_most: float | None = None

    def log_density(self, value: X) -> float:
        base = self.base.log_density(value)
        if not base > -math.inf:
            return -math.inf
        reward = float(self.reward(value))
        if math.isnan(reward) or reward == math.inf:
            raise ArgumentError(f"reward must be a number or -inf, got {reward} for {_short(value)}")
        if self.at_most is not None and reward > self.at_most:
            raise ArgumentError(f"reward {reward} is over at_most = {self.at_most}, its bound; raise or omit that")
        return base + reward

    def missing(self, value: X) -> Request | None:
        return self.base.missing(value)

    def bound(self, model: Any) -> Bound | None:
        return weighted((1, bound_of(self.base, model)), (1, None if self.at_most is None else Bound(0, self.at_most)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

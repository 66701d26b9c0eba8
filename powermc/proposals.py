"""Proposals on plain discrete spaces. Those on sequences live in `powermc.sequences`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from powermc.errors import ArgumentError
from powermc.types import Choices, Fields, Move, Steps, X


@dataclass(frozen=True)
class RandomWalk(Generic[X]):
    """Move to a neighbour chosen uniformly; `neighbours` must be symmetric (y near x exactly when x near y).

    log q(x | y) - log q(y | x) = log |N(x)| - log |N(y)|.
    """

    neighbours: Callable[[X], Sequence[X]]

    @property
    def fields(self) -> Fields:
        return {}

    def propose(self, choices: Choices, value: X) -> Steps[Move[X]]:
        near = self.neighbours(value)
        if not near:
            return Move(value, value, null=True)
        new = near[choices.integers(len(near))]
        return Move(new, value, math.log(len(near)) - math.log(len(self.neighbours(new))))
        yield  # a generator that needs no oracle


@dataclass(frozen=True)
class Independent(Generic[X]):
    """Propose from one fixed distribution, whatever the current value (an independence sampler).

    `log_weights` (nats, unnormalised) must be positive on the target's support for the chain to be irreducible; from
    a value of weight zero the move is null.
    """

    log_weights: Mapping[X, float]

    def __post_init__(self) -> None:
        if not any(weight > -math.inf for weight in self.log_weights.values()):
            raise ArgumentError("Independent needs at least one value of positive weight, got none")

    @property
    def fields(self) -> Fields:
        return {}

    def propose(self, choices: Choices, value: X) -> Steps[Move[X]]:
        here = self.log_weights.get(value, -math.inf)
        if not here > -math.inf:
            return Move(value, value, null=True)
        values, weights = zip(*self.log_weights.items(), strict=True)
        new = values[choices.categorical(np.array(weights))]
        return Move(new, value, here - self.log_weights[new])
        yield  # a generator that needs no oracle

"""Cut laws C(m | x): where a proposal leaves the current path.

The cut m is an auxiliary variable: the forward and the reverse move share it, and a proposal x' from x contributes
log C(m | x') - log C(m | x) to the log ratio (design section 3). Positions count from 0; a cut at m keeps x_<m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from powermc.bounds import claims
from powermc.errors import ArgumentError
from powermc.sequences.path import Path


class CutLaw(Protocol):
    """A distribution over cut positions given a path.

    `needs_scores` says whether `log_weights` needs a path that a model has scored, rather than its tokens alone.

    A law may also have a method `log_most(cut, length, entropy)`: an upper bound, nats, of log C(cut | x) over all
    paths x of more than `length` tokens that begin with the ones drawn so far; `entropy` holds those tokens' entropies
    by the model that weighs cuts, and is None where that has not seen them. Without the method the bound is 0.
    """

    needs_scores: ClassVar[bool]

    def log_weights(self, path: Path) -> np.ndarray:
        """Unnormalised log weights (nats) of cuts `start`, `start + 1`, ...; empty when no cut is possible.

        A law may put weight on cuts at or past the end of the path: those moves are free and change nothing.
        """
        ...

    @property
    def start(self) -> int:
        """The first position that may be cut."""
        ...


def log_prob(law: CutLaw, cut: int, path: Path) -> float:
    """log C(cut | path) in nats; -inf where the law gives the cut no weight."""
    weights = law.log_weights(path)
    at = cut - law.start
    if not 0 <= at < len(weights) or not weights[at] > -np.inf:
        return -np.inf
    peak = weights.max()
    return float(weights[at] - peak - np.log(np.exp(weights - peak).sum()))


def log_most(law: CutLaw, cut: int, length: int, entropy: Sequence[float] | None) -> float:
    """An upper bound of log C(cut | x), nats, for all x that continue `length` tokens; see `CutLaw`."""
    own: Any = law
    return own.log_most(cut, length, entropy) if claims(law, "log_most", "log_weights") else 0.0


@dataclass(frozen=True)
class Length:
    """Uniform on start..L(x)-1: the log ratio of a move is log (L(x) - start) - log (L(x') - start)."""

    start: int = 0
    needs_scores: ClassVar[bool] = False

    def log_weights(self, path: Path) -> np.ndarray:
        return np.zeros(max(len(path) - self.start, 0))

    def log_most(self, cut: int, length: int, entropy: Sequence[float] | None) -> float:
        return -math.log(length + 1 - self.start)


@dataclass(frozen=True)
class Horizon:
    """Uniform on start..stop-1 whatever the path, so its log ratio is 0; cuts past the end are free no-ops.

    With the positions of one block it is the law `block`.
    """

    stop: int
    start: int = 0
    needs_scores: ClassVar[bool] = False

    def log_weights(self, path: Path) -> np.ndarray:
        return np.zeros(self.stop - self.start)

    def log_most(self, cut: int, length: int, entropy: Sequence[float] | None) -> float:
        return -math.log(self.stop - self.start)


@dataclass(frozen=True)
class Entropy:
    """Weight h_t, the entropy of the model's own p(. | x_<t), on each t in start..L(x)-1, the last step included.

    The log ratio is log H(x) - log H(x') with H the sum over the *whole* path from `start`: the sums of two paths
    that share x_<m differ in their tails. A path whose entropies are all zero has no cut.
    """

    start: int = 0
    needs_scores: ClassVar[bool] = True

    def log_weights(self, path: Path) -> np.ndarray:
        if len(path.entropy) != len(path):
            raise ArgumentError(f"the entropy law needs a path with its entropies, got {path!r}")
        weights = path.entropy[self.start :]
        if not weights.any():
            return np.zeros(0)
        with np.errstate(divide="ignore"):
            return np.log(weights)

    def log_most(self, cut: int, length: int, entropy: Sequence[float] | None) -> float:
        if entropy is None or not entropy[cut] > 0:
            return 0.0
        return math.log(entropy[cut]) - math.log(sum(entropy[self.start :]))


CUT_LAWS = ("length", "horizon", "block", "entropy")


def cut_law(name: str, *, start: int, horizon: int, block_size: int) -> CutLaw:
    """The cut law of this name for paths of up to `horizon` tokens, cutting at `start` or later.

    `block` is uniform on the last block of `block_size` positions before the horizon. Raises `ArgumentError` for an
    unknown name.
    """
    if name == "length":
        return Length(start)
    if name == "horizon":
        return Horizon(horizon, start)
    if name == "block":
        return Horizon(horizon, max(start, (horizon - 1) // block_size * block_size))
    if name == "entropy":
        return Entropy(start)
    raise ArgumentError(f"unknown cut law {name!r}; choose one of {', '.join(CUT_LAWS)}")

"""Counter-based random streams: every number of a run is a pure function of what it is for.

A stream is keyed by (seed, prompt, chain, replica) and addressed by (step, purpose, index, draw), so that chains,
prompts and steps never share numbers, a run resumes from its step number alone, and an optimisation that skips a
draw shifts no other. The generator is Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), NumPy's.
"""

from __future__ import annotations

import hashlib
import math
import threading
from functools import lru_cache

import numpy as np

from powermc.errors import ArgumentError

_WORD = (1 << 64) - 1


class _Philox(threading.local):
    """One NumPy bit generator per thread whose counter is set before every read: a stateless function."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self.state = self.generator.state

    def __call__(self, key: tuple[int, int], counter: tuple[int, int, int, int]) -> int:
        self.state["state"]["key"][:] = key
        self.state["state"]["counter"][:] = counter
        self.state["buffer_pos"] = 4
        self.generator.state = self.state
        return int(self.generator.random_raw())


_philox = _Philox()


@lru_cache(maxsize=4096)
def _digest(*words: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little")


class UniformLevel:
    """A number u drawn once, to be compared any number of times."""

    __slots__ = ("log_u",)

    def __init__(self, u: float) -> None:
        self.log_u = math.log(u)

    def below(self, log_bound: float) -> bool:
        return self.log_u < log_bound


class Stream:
    """The production `Choices`.

    Parameters
    ----------
    seed, prompt, chain, replica
        The key. `prompt` may be any integer that tells prompts apart (such as a hash of the tokens). Streams whose
        keys differ in any part are independent.

    >>> a = Stream(0, chain=1).step(5).at("cut")
    >>> b = Stream(0, chain=1).step(5).at("cut")
    >>> a.integers(1000) == b.integers(1000)
    True
    """

    __slots__ = ("_drawn", "_index", "_key", "_purpose", "_step")

    def __init__(self, seed: int, *, prompt: int = 0, chain: int = 0, replica: int = 0) -> None:
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ArgumentError(f"seed must be an integer >= 0, got {seed!r}")
        words = (int(seed), int(prompt), int(chain), int(replica))
        self._key = (_digest("key0", *words), _digest("key1", *words))
        self._step, self._purpose, self._index, self._drawn = 0, 0, 0, 0

    def _child(self, step: int, purpose: int, index: int) -> Stream:
        child = Stream.__new__(Stream)
        child._key = self._key
        child._step, child._purpose, child._index, child._drawn = int(step) & _WORD, purpose, int(index) & _WORD, 0
        return child

    def step(self, step: int) -> Stream:
        """The choices of one step of the chain."""
        return self._child(step, 0, 0)

    def at(self, purpose: str, index: int = 0) -> Stream:
        """The choices for one purpose; purposes nest."""
        parent = _digest(self._purpose, self._index) if self._index else self._purpose
        return self._child(self._step, _digest(parent, purpose), index)

    def uniform(self) -> float:
        """The next number of this stream, uniform on (0, 1), never 0 or 1."""
        word = _philox(self._key, (self._drawn, self._index, self._purpose, self._step))
        self._drawn += 1
        return ((word >> 12) + 0.5) * 2.0**-52  # 53 bits would round up to 1

    def categorical(self, log_weights: np.ndarray) -> int:
        return inverse_cdf(log_weights, self.uniform())

    def integers(self, n: int) -> int:
        # floor(u n) is uniform up to n 2^-53, far below what any run can see.
        if n < 1:
            raise ArgumentError(f"integers(n) needs n >= 1, got {n}")
        return min(int(self.uniform() * n), n - 1)

    def level(self) -> UniformLevel:
        return UniformLevel(self.uniform())


def inverse_cdf(log_weights: np.ndarray, u: float) -> int:
    """The smallest index i with u W < w_0 + ... + w_i, where w = exp(log_weights) and W is their sum.

    Never returns an index of zero weight. Raises `ArgumentError` when no weight is positive or one is NaN or +inf.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    peak = log_weights.max()
    if not np.isfinite(peak):
        raise ArgumentError(f"cannot draw from weights whose largest log is {peak}")
    cumulative = np.exp(log_weights - peak).cumsum()
    index = int(cumulative.searchsorted(u * cumulative[-1], side="right"))
    if index >= len(cumulative):  # u W rounded up to W
        index = int(np.flatnonzero(log_weights > -np.inf)[-1])
    return index

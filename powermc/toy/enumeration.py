"""The exact law of a tabular model, by visiting every path (numba)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from powermc.errors import ArgumentError
from powermc.sequences.path import Path, Prompt, Space
from powermc.targets import _check_exponent
from powermc.toy.tabular import TabularModel


class ExactLaw(NamedTuple):
    """Every path of positive probability, in lexicographic order.

    tokens: int32, shape (N, horizon), -1 after the end. length: int32 (N,). log_p: float64 (N,), nats.
    """

    tokens: np.ndarray
    length: np.ndarray
    log_p: np.ndarray

    def power(self, alpha: float) -> np.ndarray:
        """pi = p^alpha / sum p^alpha over all paths, shape (N,)."""
        _check_exponent("alpha", alpha)
        weights = np.exp(alpha * (self.log_p - self.log_p.max()))
        return weights / weights.sum()

    def paths(self, space: Space, prompt: Prompt = Prompt()) -> list[Path]:
        """The same paths as objects, in the same order, not yet scored."""
        return [space.path(prompt, row[:n]) for row, n in zip(self.tokens, self.length, strict=True)]


def exact_law(model: TabularModel, space: Space, limit: int = 50_000_000) -> ExactLaw:
    """Enumerate the support of p on `space`.

    Raises `ArgumentError` for a space with a stop rule (a Python predicate; use `powermc.testing.paths_of`), and when
    there are more than `limit` paths.
    """
    if space.stop is not None:
        raise ArgumentError("exact_law cannot call a stop rule; use powermc.testing.paths_of for this space")
    end = np.zeros(model.vocab_size, dtype=np.bool_)
    end[[e for e in space.eos if 0 <= e < model.vocab_size]] = True
    n = _walk(model.table, model.order, end, space.horizon, limit, _NO_TOKENS, _NO_LENGTH, _NO_LOG_P)
    if n > limit:
        raise ArgumentError(f"more than {limit} paths of positive probability; shorten the horizon or raise limit")
    law = ExactLaw(np.full((n, space.horizon), -1, np.int32), np.empty(n, np.int32), np.empty(n))
    _walk(model.table, model.order, end, space.horizon, limit, law.tokens, law.length, law.log_p)
    return law


_NO_TOKENS = np.zeros((0, 0), np.int32)
_NO_LENGTH = np.zeros(0, np.int32)
_NO_LOG_P = np.zeros(0)


@njit(cache=True, nogil=True)
def _walk(table, order, end, horizon, limit, tokens, length, log_p):  # pragma: no cover - compiled
    """Depth-first over all prefixes; count the paths, and write them down if there is room. Returns the count."""
    vocab = table.shape[1]
    base = vocab + 1
    size = base**order
    current = np.full(horizon, -1, np.int64)
    context = np.empty(horizon + 1, np.int64)
    partial = np.zeros(horizon + 1)
    context[0] = size - 1
    count = 0
    t = 0
    while t >= 0:
        current[t] += 1
        v = current[t]
        if v == vocab:
            current[t] = -1
            t -= 1
            continue
        p = table[context[t], v]
        if p == 0.0:
            continue
        partial[t + 1] = partial[t] + np.log(p)
        if end[v] or t + 1 == horizon:
            if count < len(log_p):
                for i in range(t + 1):
                    tokens[count, i] = current[i]
                length[count] = t + 1
                log_p[count] = partial[t + 1]
            count += 1
            if count > limit:
                return count
        else:
            context[t + 1] = (context[t] * base + v) % size
            t += 1
    return count

"""Normalisers, entropy and inverse-CDF draws of many rows of logits in one call (numba).

Logits are read as they are (float32 or float64), every sum is float64. Equal to `powermc.choices.inverse_cdf` on
exponent * log softmax(logits) up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
from numba import njit, prange

_WORTH_THREADS = 20_000


class Rows(NamedTuple):
    """Per row of logits, in nats. `token` is the one drawn or given, `log_p` its log probability.

    finite: False where the logits hold NaN or +inf, or nothing but -inf; the row's other fields then mean nothing.
    log_z: shape (A, E), log sum_v p(v)^e over the tokens that are not masked; -inf, and `token` -1, where none is left.
    margin, slack: see `powermc.sequences.Path` and `powermc.sequences.Token`.
    """

    finite: np.ndarray
    token: np.ndarray
    log_p: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray
    log_z: np.ndarray
    slack: np.ndarray


_NO_MASKS = np.zeros((0, 0), np.bool_)


def softmax_rows(
    logits: np.ndarray,
    exponents: np.ndarray,
    uniform: np.ndarray,
    token: np.ndarray,
    threads: int = 1,
    masks: np.ndarray = _NO_MASKS,
    mask: np.ndarray | None = None,
) -> Rows:
    """Evaluate rows of logits.

    Parameters
    ----------
    logits
        Shape (A, V), float32 or float64, C-contiguous.
    exponents
        Shape (A, E); E >= 1 where a row draws. Token i is drawn from softmax(exponents[i, 0] * logits[i]).
    uniform
        Shape (A,): the number to draw with, or NaN to take `token` as given.
    token
        Shape (A,): tokens to score where nothing is drawn; -1 for none (log_p is then 0).
    threads
        The most threads to use; the result does not depend on it.
    masks, mask
        Shapes (K, V), bool, and (A, E): exponent e of row i leaves out the tokens where masks[mask[i, e]] is true;
        -1 for none.
    """
    n, e = exponents.shape
    mask = np.full((n, e), -1) if mask is None else mask
    zeros, ones = (lambda: np.zeros(n)), np.ones(n)
    out = Rows(np.ones(n, np.bool_), token.astype(np.int64), zeros(), zeros(), zeros(), np.zeros((n, e)), ones)
    if threads > 1 and logits.size > _WORTH_THREADS:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        _on_threads(logits, exponents, uniform, masks, mask, *out)
    else:
        _on_one(logits, exponents, uniform, masks, mask, *out)
    return out


def _evaluate(
    logits, exponents, uniform, masks, mask, finite, token, log_p, entropy, margin, log_z, slack
):  # pragma: no cover - compiled
    vocab = logits.shape[1]
    for i in prange(logits.shape[0]):
        row = logits[i]
        peak = -np.inf
        second = -np.inf
        for v in range(vocab):
            x = row[v]
            if x > peak:
                second = peak
                peak = x
            elif x > second:
                second = x
            elif x != x:
                peak = np.inf
                break
        if not np.isfinite(peak):
            finite[i] = False
            continue
        top = np.float64(peak)
        base = np.empty(vocab)  # exp(logit - peak)
        total = 0.0
        weighted = 0.0
        for v in range(vocab):
            d = np.float64(row[v]) - top
            w = np.exp(d)
            base[v] = w
            if w > 0.0:
                total += w
                weighted += w * d
        log_total = np.log(total)
        entropy[i] = max(log_total - weighted / total, 0.0)
        margin[i] = (1.0 - np.exp(np.float64(second) - top)) / total
        drawing = uniform[i] == uniform[i]
        for e in range(exponents.shape[1] - 1, -1, -1):  # the exponent of the draw last: its weights stay
            exponent = exponents[i, e]
            masked = mask[i, e] >= 0
            weights = base if exponent == 1.0 and not masked else np.empty(vocab)
            mass = total
            if exponent != 1.0 or masked:
                mass = 0.0
                squarings = 1 if exponent == 2.0 else 2 if exponent == 4.0 else 3 if exponent == 8.0 else 0
                for v in range(vocab):
                    if masked and masks[mask[i, e], v]:
                        w = 0.0
                    elif squarings or exponent == 1.0:  # a power by squaring costs a tenth of another exp
                        w = base[v]
                        for _ in range(squarings):
                            w *= w
                    else:
                        w = np.exp(exponent * (np.float64(row[v]) - top))
                    weights[v] = w
                    mass += w
                log_z[i, e] = np.log(mass) - exponent * log_total if mass > 0.0 else -np.inf
            if e == 0 and drawing and mass == 0.0:
                token[i] = -1
            elif e == 0 and drawing:
                goal = uniform[i] * mass
                reached = 0.0
                before = 0.0
                for v in range(vocab):
                    w = weights[v]
                    if w > 0.0:
                        before = reached
                        token[i] = v
                        reached += w
                        if reached > goal:
                            break
                slack[i] = min(reached - goal, goal - before) / mass
        if token[i] >= 0:
            log_p[i] = np.float64(row[token[i]]) - top - log_total


_on_one = njit(cache=True, nogil=True)(_evaluate)
_on_threads = njit(parallel=True, cache=True, nogil=True)(_evaluate)


def log_softmax(logits: np.ndarray, exponent: float, left_out: Sequence[int] = ()) -> np.ndarray:
    """exponent * log softmax of one row, unnormalised, float64: what an enumerating `Choices` draws from."""
    row = exponent * (logits.astype(np.float64) - logits.max())
    row[list(left_out)] = -np.inf
    return row

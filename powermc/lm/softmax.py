"""Normalisers, entropy, top-two margin and inverse-CDF draws of rows of logits, in one call.

On the CPU: `softmax_rows`, compiled by numba (`powermc.lm.softmax_numba`). Where the logits are torch tensors, on
whatever device: `powermc.lm.softmax_torch.evaluate_logits`. Logits are read as they are (float32 or float64), every
weight and every sum is float64.

Errors, against exact arithmetic on the logits as given, up to 2^18 tokens and exponents up to 8:

- log p, log Z, entropy: 1e-12 (1 + |value|) nats; margin: 1e-12;
- a draw's boundaries: 1e-12 of the row's mass. So the token is that of `powermc.choices.inverse_cdf` on
  exponent * log softmax(logits) wherever `slack` exceeds 1e-12 and the error of `inverse_cdf` itself, which adds up
  one weight after the other (1e-16 times the vocabulary).

A weight under e^-708 of the largest counts as zero, and a token of zero weight is never drawn. Rows do not depend on
one another, on their number, or on the number of threads: not by a single bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread
from typing import NamedTuple

import numpy as np

from powermc.errors import ArgumentError
from powermc.lm.softmax_numba import evaluate

_WORTH_A_THREAD = 50_000  # logits; starting a thread costs about half of evaluating them


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


NO_MASKS = np.zeros((0, 0), np.bool_)


def check_tokens(token: np.ndarray, vocab: int) -> None:
    """Raise `ArgumentError` unless every token is one of the vocabulary, or -1: the compiled code looks them up."""
    outside = token[(token < -1) | (token >= vocab)]
    if len(outside):
        raise ArgumentError(f"token {outside[0]} is not in the vocabulary: give one of 0..{vocab - 1}, or -1 for none")


def softmax_rows(
    logits: np.ndarray,
    exponents: np.ndarray,
    uniform: np.ndarray,
    token: np.ndarray,
    threads: int = 1,
    masks: np.ndarray = NO_MASKS,
    mask: np.ndarray | None = None,
) -> Rows:
    """Evaluate rows of logits.

    Parameters
    ----------
    logits
        Shape (A, V), float32 or float64, C-contiguous.
    exponents
        Shape (A, E), >= 0; E >= 1 where a row draws. Token i is drawn from softmax(exponents[i, 0] * logits[i]).
    uniform
        Shape (A,): the number in [0, 1) to draw with, or NaN to take `token` as given.
    token
        Shape (A,): tokens to score where nothing is drawn; -1 for none (log_p is then 0).
    threads
        The most threads to use; the result does not depend on it.
    masks, mask
        Shapes (K, V), bool, and (A, E): exponent e of row i leaves out the tokens where masks[mask[i, e]] is true;
        -1 for none.

    Raises `ArgumentError` for a token outside the vocabulary.
    """
    n, e = exponents.shape
    check_tokens(token, logits.shape[1])
    mask = np.full((n, e), -1) if mask is None else mask
    zeros, ones = (lambda: np.zeros(n)), np.ones(n)
    out = Rows(np.ones(n, np.bool_), token.astype(np.int64), zeros(), zeros(), zeros(), np.zeros((n, e)), ones)
    work = (logits, exponents, uniform, masks, mask, *out)
    # Python threads round code that holds no lock, not numba's: they run the very same machine code as one thread
    # does, leave numba's global setting alone, and two of these calls may overlap.
    share = max(-(-n // max(threads, 1)), _WORTH_A_THREAD // logits.shape[1], 1)
    others = [Thread(target=evaluate, args=(i, min(i + share, n), *work)) for i in range(share, n, share)]
    for other in others:
        other.start()
    evaluate(0, min(share, n), *work)
    for other in others:
        other.join()
    return out


def log_softmax(logits: np.ndarray, exponent: float, left_out: Sequence[int] = ()) -> np.ndarray:
    """exponent * log softmax of one row, unnormalised, float64: what an enumerating `Choices` draws from."""
    row = exponent * (logits.astype(np.float64) - logits.max())
    row[list(left_out)] = -np.inf
    return row

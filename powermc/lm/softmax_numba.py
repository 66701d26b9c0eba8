"""The compiled loops of `powermc.lm.softmax.softmax_rows`.

A row is read once for its two largest logits and once for all its sums, in blocks that stay in the first-level cache;
the block that holds the draw is read a third time. No array of the vocabulary's size is written, unless a law leaves
tokens out.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
from numba import njit

_BLOCK = 512
_LOWEST = -708.0  # exp of less is no normal float64

# Functions whose sums may be reordered say so (`reassoc`); nothing assumes that numbers are finite.
_inner = njit(cache=True, nogil=True, forceinline=True)
_fused = njit(cache=True, nogil=True, forceinline=True, fastmath={"contract"})
_reordered = njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})

_LOG2_E = 1 / math.log(2)
_LN2_HIGH = math.floor(math.ldexp(math.log(2), 32)) / 2**32  # short, so that k times it is exact
_LN2_LOW = float(Decimal(2).ln() - Decimal(_LN2_HIGH))
_ROUND = 1.5 * 2**52  # adding it leaves the nearest integer in the lowest bits
_TAYLOR = tuple(1 / math.factorial(n) for n in range(12, -1, -1))


@_fused
def _exp(x):  # pragma: no cover - compiled
    """exp(x) for x <= 0, within 4e-16 of itself: 2^k times the Taylor series on |r| <= log(2)/2; NaN for NaN.

    Arithmetic only, so that loops over it become vector code; a call of the C library's exp costs ten times as much.
    """
    y = _LOWEST if x < _LOWEST else x
    shifted = y * _LOG2_E + _ROUND
    k = shifted - _ROUND
    r = y - k * _LN2_HIGH - k * _LN2_LOW
    s = 0.0
    for c in _TAYLOR:
        s = s * r + c
    power = np.int64((np.float64(shifted).view(np.int64) + np.int64(1023)) << np.int64(52)).view(np.float64)
    return 0.0 if x < _LOWEST else s * power


@_inner
def _top_two(row, first, second):  # pragma: no cover - compiled
    """The two largest of a row, NaN passed over; each place of a block keeps its own two (scratch), compared last."""
    first[:] = -np.inf
    second[:] = -np.inf
    for begin in range(0, len(row), _BLOCK):
        block = row[begin : begin + _BLOCK]
        for j in range(len(block)):
            x = block[j]
            lesser = first[j] if x > first[j] else x
            first[j] = x if x > first[j] else first[j]
            second[j] = lesser if lesser > second[j] else second[j]
    peak = -np.inf
    runner_up = -np.inf
    for j in range(min(len(row), _BLOCK)):
        x = np.float64(first[j])
        runner_up = max(runner_up, min(x, peak), np.float64(second[j]))
        peak = max(peak, x)
    return peak, runner_up


@_inner
def _exps(row, peak, gaps, base):  # pragma: no cover - compiled
    """Of one block: the gaps x - peak <= 0, and their exp."""
    for j in range(len(row)):
        gaps[j] = np.float64(row[j]) - peak
        base[j] = _exp(gaps[j])


@_fused
def _powers(gaps, base, exponent, weights):  # pragma: no cover - compiled
    """exp(exponent * gaps), in `weights` or in `base` itself; by squaring where that does it, a tenth of the price."""
    if exponent == 1.0:
        return base
    squarings = 1 if exponent == 2.0 else 2 if exponent == 4.0 else 3 if exponent == 8.0 else 0
    if not squarings:
        for j in range(len(gaps)):
            w = _exp(exponent * gaps[j])
            weights[j] = 0.0 if gaps[j] == -np.inf else w  # 0 times infinity is NaN
        return weights
    for j in range(len(base)):
        weights[j] = base[j] * base[j]
    for _ in range(squarings - 1):
        for j in range(len(weights)):
            weights[j] *= weights[j]
    return weights


@_reordered
def _sum(weights):  # pragma: no cover - compiled
    total = 0.0
    for j in range(len(weights)):
        total += weights[j]
    return total


@_reordered
def _sum_of_gaps(weights, gaps):  # pragma: no cover - compiled
    """sum w * gap, nothing where w is 0 and the gap infinite."""
    total = 0.0
    for j in range(len(weights)):
        total += weights[j] * (_LOWEST if gaps[j] < _LOWEST else gaps[j])
    return total


@_inner
def _masses(row, peak, exponents, sums, scratch):  # pragma: no cover - compiled
    """sums[e, b] = sum of exp(exponents[e] * (x - peak)) over block b; returns sum w and sum w * (x - peak)."""
    total = 0.0
    weighted = 0.0
    for b in range(sums.shape[1]):
        block = row[b * _BLOCK : (b + 1) * _BLOCK]
        gaps, base, weights = scratch[0, : len(block)], scratch[1, : len(block)], scratch[2, : len(block)]
        _exps(block, peak, gaps, base)
        total += _sum(base)
        weighted += _sum_of_gaps(base, gaps)
        for e in range(len(exponents)):
            sums[e, b] = _sum(_powers(gaps, base, exponents[e], weights))
    return total, weighted


@_inner
def _find(weights, goal, reached):  # pragma: no cover - compiled
    """The first place where `reached`, with the weights up to it, exceeds the goal; else the last of weight > 0.

    Returns it and the sums before it and with it.
    """
    place = -1
    before = reached
    for j in range(len(weights)):
        if weights[j] > 0.0:
            place = j
            before = reached
            reached += weights[j]
            if reached > goal:
                break
    return place, before, reached


@njit(cache=True, nogil=True)
def evaluate(
    begin, end, logits, exponents, uniform, masks, mask, finite, token, log_p, entropy, margin, log_z, slack
):  # pragma: no cover - compiled
    vocab, laws = logits.shape[1], exponents.shape[1]
    first, second = np.empty(_BLOCK, logits.dtype), np.empty(_BLOCK, logits.dtype)
    scratch = np.empty((3, _BLOCK))
    sums = np.empty((laws, -(-vocab // _BLOCK)))
    for i in range(begin, end):
        row = logits[i]
        top, runner_up = _top_two(row, first, second)
        if not np.isfinite(top):
            finite[i] = False
            continue
        total, weighted = _masses(row, top, exponents[i], sums, scratch)
        if total != total:
            finite[i] = False
            continue
        log_total = np.log(total)
        entropy[i] = max(log_total - weighted / total, 0.0)
        margin[i] = (1.0 - np.exp(runner_up - top)) / total
        for e in range(laws - 1, -1, -1):  # the law of the draw last
            law, peak = row, top
            if mask[i, e] >= 0:
                law = row.copy()
                for v in range(vocab):
                    if masks[mask[i, e], v]:
                        law[v] = -np.inf
                peak, _ = _top_two(law, first, second)
                if peak > -np.inf:
                    _masses(law, peak, exponents[i, e : e + 1], sums[e : e + 1], scratch)
            drawing = e == 0 and uniform[i] == uniform[i]
            if peak == -np.inf:
                log_z[i, e] = -np.inf
                token[i] = -1 if drawing else token[i]
                continue
            mass = 0.0
            for b in range(sums.shape[1]):
                mass += sums[e, b]
            log_z[i, e] = np.log(mass) + exponents[i, e] * (peak - top - log_total)
            if drawing:
                goal = uniform[i] * mass
                b, reached, _ = _find(sums[0], goal, 0.0)
                block = law[b * _BLOCK : (b + 1) * _BLOCK]
                gaps, base, weights = scratch[0, : len(block)], scratch[1, : len(block)], scratch[2, : len(block)]
                _exps(block, peak, gaps, base)
                place, before, reached = _find(_powers(gaps, base, exponents[i, 0], weights), goal, reached)
                token[i] = b * _BLOCK + place
                slack[i] = max(min(reached - goal, goal - before), 0.0) / mass
        if token[i] >= 0:
            log_p[i] = np.float64(row[token[i]]) - top - log_total

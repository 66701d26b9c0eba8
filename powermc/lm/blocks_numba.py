"""The compiled loops of `powermc.lm.blocks`: what each thread does in a pass through a span of blocks.

Everything lies with its lanes side by side, (features, lanes): a *lane* is one token of one row. Threads claim parts of
a phase from a counter, and wait for each other between phases.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from powermc.lm.tiles import TILE, carray, claim, floats, integers, multiply, part, wait

# Positions of a job, all int64. Addresses but for the numbers in the first line.
(LANES, WIDTH, HEADS, GROUPS, DIM, MIDDLE, LAYERS, TOKENS) = range(8)
(WEIGHTS, STATES, COS, SIN, SLOTS, PLACES, KEYS, VALUES) = range(8, 16)
(LAYER_STRIDE, ROW_STRIDE, HEAD_STRIDE, SCRATCH, COUNTERS, BARRIER, NUMBERS, THREADS) = range(16, 24)
JOB = 24
"""GROUPS: heads of keys and values. TOKENS: lanes in use. SLOTS, PLACES: row and position of each. Strides in
floats."""

(NORM_1, NORM_2, NORM_Q, NORM_K, Q, K, V, OUT, GATE, UP, DOWN) = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
PER_LAYER = 18
"""A layer's addresses: four norms (0: none), then seven matrices, each followed by its bias (0: none)."""
(EPS, EPS_QK, SCALING) = range(3)
PHASES = 6

_LOWEST = np.float32(-87.0)  # exp of less is no normal float32
_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(math.floor(math.ldexp(math.log(2), 9)) / 2**9)  # short, so that k times it is exact
_LN2_LOW = np.float32(math.log(2) - float(_LN2_HIGH))
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the lowest bits
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(7, -1, -1))

# Sums may be reordered where it says so; nothing assumes that numbers are finite.
_contracted = njit(cache=True, nogil=True, forceinline=True, fastmath={"contract"})
_inner = njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})


@_inner
def _normed(states, weight, eps, out):  # pragma: no cover - compiled
    """RMS norm of every lane: out = weight * states / sqrt(mean(states^2) + eps)."""
    width, lanes = states.shape
    squares = np.zeros(lanes, np.float32)
    for i in range(width):
        for lane in range(lanes):
            squares[lane] += states[i, lane] * states[i, lane]
    for lane in range(lanes):
        squares[lane] = 1.0 / math.sqrt(squares[lane] / width + eps)
    for i in range(width):
        w = weight[i]
        for lane in range(lanes):
            out[i, lane] = w * (states[i, lane] * squares[lane])


@_inner
def _turned(column, norm, eps, cos, sin, out):  # pragma: no cover - compiled
    """One head of one lane, normed if it has a norm, turned by its position: x cos + rotate_half(x) sin."""
    dim = len(out)
    scale = np.float32(1.0)
    if norm != 0:
        squares = np.float32(0.0)
        for d in range(dim):
            squares += column[d] * column[d]
        scale = np.float32(1.0 / math.sqrt(squares / dim + eps))
        weight = carray(floats(norm), (dim,))
        for d in range(dim):
            column[d] = weight[d] * (column[d] * scale)
    half = dim // 2
    for d in range(half):
        out[d] = column[d] * cos[d] - column[d + half] * sin[d]
        out[d + half] = column[d + half] * cos[d + half] + column[d] * sin[d + half]


@_contracted
def _exp(x):  # pragma: no cover - compiled
    """exp(x) in float32 for x <= 0, within 2e-7 of itself; 0 below e^-87; NaN for NaN.

    2^k times a polynomial on |r| <= log(2)/2, arithmetic only, so that a loop over it becomes vector code.
    """
    y = _LOWEST if x < _LOWEST else x
    shifted = y * _LOG2_E + _ROUND
    k = shifted - _ROUND
    r = y - k * _LN2_HIGH - k * _LN2_LOW
    s = _TAYLOR[0]
    for c in _TAYLOR[1:]:
        s = s * r + c
    power = np.int32((np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if x < _LOWEST else s * power


@_inner
def _attend(query, keys, values, scaling, weights, out):  # pragma: no cover - compiled
    """softmax(scaling query keys^T) values for one query; `weights` is scratch. Four positions are read at once."""
    n, dim = keys.shape
    fours = n - n % 4
    for t in range(0, fours, 4):
        a, b, c, e = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for d in range(dim):
            q = query[d]
            a += q * keys[t, d]
            b += q * keys[t + 1, d]
            c += q * keys[t + 2, d]
            e += q * keys[t + 3, d]
        weights[t], weights[t + 1], weights[t + 2], weights[t + 3] = a, b, c, e
    for t in range(fours, n):
        a = np.float32(0.0)
        for d in range(dim):
            a += query[d] * keys[t, d]
        weights[t] = a
    peak = weights[0]
    for t in range(1, n):
        peak = weights[t] if weights[t] > peak else peak
    for t in range(n):
        weights[t] = _exp((weights[t] - peak) * scaling)
    total = np.float32(0.0)
    for t in range(n):
        total += weights[t]
    for d in range(dim):
        out[d] = 0.0
    for t in range(0, fours, 4):
        a, b, c, e = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for d in range(dim):
            out[d] += a * values[t, d] + b * values[t + 1, d] + c * values[t + 2, d] + e * values[t + 3, d]
    for t in range(fours, n):
        for d in range(dim):
            out[d] += weights[t] * values[t, d]
    for d in range(dim):
        out[d] /= total


@_inner
def _rows(lanes, weight, bias, k, first, x, out):  # pragma: no cover - compiled
    """out (TILE, lanes) = outputs first..first+TILE-1 of W x + bias."""
    multiply(lanes, weight + first * k * 4, x, k, out.ctypes.data)
    if bias != 0:
        added = carray(floats(bias), (first + TILE,))
        for m in range(TILE):
            for lane in range(lanes):
                out[m, lane] += added[first + m]


@_inner
def _add(lanes, weight, bias, outputs, k, x, states, counter, chunk, sums):  # pragma: no cover - compiled
    """states += W x + bias, by all threads."""
    while True:
        first = claim(counter, chunk)
        if first >= outputs:
            return
        for at in range(first, min(first + chunk, outputs), TILE):
            _rows(lanes, weight, bias, k, at, x, sums)
            for m in range(TILE):
                for lane in range(lanes):
                    states[at + m, lane] += sums[m, lane]


@_inner
def _gated(lanes, table, width, middle, x, out, counter, chunk, sums, ups):  # pragma: no cover - compiled
    """out = silu(gate x) * (up x), by all threads."""
    while True:
        first = claim(counter, chunk)
        if first >= middle:
            return
        for at in range(first, min(first + chunk, middle), TILE):
            _rows(lanes, table[GATE], table[GATE + 1], width, at, x, sums)
            _rows(lanes, table[UP], table[UP + 1], width, at, x, ups)
            for m in range(TILE):
                for lane in range(lanes):
                    g = sums[m, lane]
                    e = _exp(-abs(g))
                    share = (np.float32(1.0) if g >= 0 else e) / (np.float32(1.0) + e)
                    out[at + m, lane] = g * share * ups[m, lane]


@_inner
def _project(lanes, table, width, queries, others, x, out, counter, chunk):  # pragma: no cover - compiled
    """out = queries, keys and values of x, one after the other, by all threads."""
    outputs = queries + 2 * others
    while True:
        first = claim(counter, chunk)
        if first >= outputs:
            return
        for at in range(first, min(first + chunk, outputs), TILE):
            if at < queries:
                which, row = Q, at
            elif at < queries + others:
                which, row = K, at - queries
            else:
                which, row = V, at - queries - others
            _rows(lanes, table[which], table[which + 1], width, row, x, out[at : at + TILE])


@cfunc(types.void(types.CPointer(types.intp)), cache=True)
def run(job: Any) -> None:  # pragma: no cover - compiled
    """A span of blocks, from the states that come in to those that go out, as one of many threads."""
    lanes, width, heads, groups, dim, middle = job[LANES], job[WIDTH], job[HEADS], job[GROUPS], job[DIM], job[MIDDLE]
    tokens, barrier, layers = job[TOKENS], job[BARRIER], job[LAYERS]
    queries, others, share = heads * dim, groups * dim, heads // groups
    chunk, chunk_qkv = part(width, job[THREADS]), part(queries + 2 * others, job[THREADS])
    chunk_middle = part(middle, job[THREADS])
    table = carray(integers(job[WEIGHTS]), (layers, PER_LAYER))
    slots, places = carray(integers(job[SLOTS]), (tokens,)), carray(integers(job[PLACES]), (tokens,))
    cos, sin = carray(floats(job[COS]), (tokens, dim)), carray(floats(job[SIN]), (tokens, dim))
    numbers = carray(floats(job[NUMBERS]), (3,))
    states = carray(floats(job[STATES]), (width, lanes))
    projected = carray(floats(job[SCRATCH]), (queries + 2 * others, lanes))
    attended = carray(floats(job[SCRATCH] + (queries + 2 * others) * lanes * 4), (queries, lanes))
    gated = carray(floats(job[SCRATCH] + 2 * (queries + others) * lanes * 4), (middle, lanes))
    longest = 0
    for i in range(tokens):
        longest = max(longest, places[i] + 1)
    x, sums, ups = (
        np.empty((width, lanes), np.float32),
        np.empty((TILE, lanes), np.float32),
        np.empty((TILE, lanes), np.float32),
    )
    head, turned, out = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
    weights = np.empty(longest, np.float32)
    for layer in range(layers):
        at = job[COUNTERS] + layer * PHASES * 8
        own = table[layer]
        _normed(states, carray(floats(own[NORM_1]), (width,)), numbers[EPS], x)
        _project(lanes, own, width, queries, others, x.ctypes.data, projected, at, chunk_qkv)
        if barrier != 0:
            wait(barrier)
        while True:  # keys and values go where they will be found
            task = claim(at + 8, 1)
            if task >= tokens * groups:
                break
            lane, group = task // groups, task % groups
            base = (layer * job[LAYER_STRIDE] + slots[lane] * job[ROW_STRIDE] + group * job[HEAD_STRIDE]
                    + places[lane] * dim) * 4  # fmt: skip
            for d in range(dim):
                head[d] = projected[queries + group * dim + d, lane]
            _turned(head, own[NORM_K], numbers[EPS_QK], cos[lane], sin[lane], carray(floats(job[KEYS] + base), (dim,)))
            value = carray(floats(job[VALUES] + base), (dim,))
            for d in range(dim):
                value[d] = projected[queries + others + group * dim + d, lane]
        if barrier != 0:
            wait(barrier)
        while True:
            task = claim(at + 16, 1)
            if task >= tokens * groups:
                break
            lane, group = task // groups, task % groups
            base = (layer * job[LAYER_STRIDE] + slots[lane] * job[ROW_STRIDE] + group * job[HEAD_STRIDE]) * 4
            n = places[lane] + 1
            keys, values = carray(floats(job[KEYS] + base), (n, dim)), carray(floats(job[VALUES] + base), (n, dim))
            for h in range(group * share, (group + 1) * share):
                for d in range(dim):
                    head[d] = projected[h * dim + d, lane]
                _turned(head, own[NORM_Q], numbers[EPS_QK], cos[lane], sin[lane], turned)
                _attend(turned, keys, values, numbers[SCALING], weights, out)
                for d in range(dim):
                    attended[h * dim + d, lane] = out[d]
        if barrier != 0:
            wait(barrier)
        _add(lanes, own[OUT], own[OUT + 1], width, queries, attended.ctypes.data, states, at + 24, chunk, sums)
        if barrier != 0:
            wait(barrier)
        _normed(states, carray(floats(own[NORM_2]), (width,)), numbers[EPS], x)
        _gated(lanes, own, width, middle, x.ctypes.data, gated, at + 32, chunk_middle, sums, ups)
        if barrier != 0:
            wait(barrier)
        _add(lanes, own[DOWN], own[DOWN + 1], width, middle, gated.ctypes.data, states, at + 40, chunk, sums)
        if barrier != 0:
            wait(barrier)

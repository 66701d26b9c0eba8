"""The compiled loops of `powermc.lm.blocks`: what each thread does in a pass through a span of blocks.

Everything lies with its lanes side by side, (features, lanes): a *lane* is one token of one row. Threads claim parts of
a phase from a counter, and wait for each other between phases.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from powermc.lm.softmax_numba import _exp
from powermc.lm.tiles import TILE, carray, claim, floats, integers, multiply, wait

# Positions of a job, all int64. Addresses but for the numbers in the first line.
(LANES, WIDTH, HEADS, GROUPS, DIM, MIDDLE, LAYERS, TOKENS) = range(8)
(WEIGHTS, STATES, COS, SIN, SLOTS, PLACES, KEYS, VALUES) = range(8, 16)
(LAYER_STRIDE, ROW_STRIDE, HEAD_STRIDE, SCRATCH, COUNTERS, BARRIER, NUMBERS) = range(16, 23)
JOB = 23
"""GROUPS: heads of keys and values. TOKENS: lanes in use. SLOTS, PLACES: row and position of each. Strides in
floats."""

(NORM_1, NORM_2, NORM_Q, NORM_K, Q, K, V, OUT, GATE, UP, DOWN) = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
PER_LAYER = 18
"""A layer's addresses: four norms (0: none), then seven matrices, each followed by its bias (0: none)."""
(EPS, EPS_QK, SCALING) = range(3)
PHASES = 6

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


@_inner
def _attend(query, keys, values, scaling, weights, out):  # pragma: no cover - compiled
    """softmax(scaling query keys^T) values for one query; `weights` is scratch."""
    n, dim = keys.shape
    peak = np.float32(-np.inf)
    for t in range(n):
        score = np.float32(0.0)
        for d in range(dim):
            score += query[d] * keys[t, d]
        weights[t] = score * scaling
        peak = max(peak, weights[t])
    total = np.float32(0.0)
    for t in range(n):
        weights[t] = np.float32(_exp(np.float64(weights[t] - peak)))
        total += weights[t]
    for d in range(dim):
        out[d] = 0.0
    for t in range(n):
        w = weights[t] / total
        for d in range(dim):
            out[d] += w * values[t, d]


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
                    g = np.float64(sums[m, lane])
                    e = _exp(-abs(g))
                    share = 1.0 / (1.0 + e) if g >= 0 else e / (1.0 + e)
                    out[at + m, lane] = np.float32(g * share) * ups[m, lane]


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
        _project(lanes, own, width, queries, others, x.ctypes.data, projected, at, 4 * TILE)
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
        _add(lanes, own[OUT], own[OUT + 1], width, queries, attended.ctypes.data, states, at + 24, 2 * TILE, sums)
        if barrier != 0:
            wait(barrier)
        _normed(states, carray(floats(own[NORM_2]), (width,)), numbers[EPS], x)
        _gated(lanes, own, width, middle, x.ctypes.data, gated, at + 32, 4 * TILE, sums, ups)
        if barrier != 0:
            wait(barrier)
        _add(lanes, own[DOWN], own[DOWN + 1], width, middle, gated.ctypes.data, states, at + 40, 2 * TILE, sums)
        if barrier != 0:
            wait(barrier)

"""Tabular autoregressive models: small enough that the law of every path can be written down.

The next-token distribution depends on the last `order` tokens (and on how many there have been, up to `order`), so
`order >= horizon - 1` gives every prefix a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.model import Exponent, Extend, Score, Token, Without
from powermc.sequences.path import Path, Tokens
from powermc.types import Choices, Request


@dataclass(frozen=True)
class TabularModel:
    """An `Autoregressive` model given by a table.

    Parameters
    ----------
    table
        Shape ((V + 1)^order, V): row c holds the next-token probabilities after context c. The context is the last
        `order` tokens read as a number in base V + 1, oldest first, missing ones counted as V.
    order
        How many tokens back the table looks, >= 0.

    Rows must sum to 1 (to 1e-9); entries may be 0. Raises `ArgumentError` otherwise.
    """

    table: np.ndarray
    order: int
    resolution: float = 0.0
    _memo: dict[tuple[int, Exponent], tuple[np.ndarray, float]] = field(default_factory=dict, repr=False, compare=False)
    _rows: dict[int, tuple[np.ndarray, float, float]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = np.ascontiguousarray(self.table, dtype=np.float64)
        if table.ndim != 2 or self.order < 0 or len(table) != (table.shape[1] + 1) ** self.order:
            raise ArgumentError(f"a table of order {self.order} needs shape ((V+1)^order, V), got {table.shape}")
        if not (table >= 0).all() or not np.allclose(table.sum(1), 1, rtol=0, atol=1e-9):
            raise ArgumentError("every row of the table must hold probabilities that sum to 1")
        object.__setattr__(self, "table", table)

    @classmethod
    def random(
        cls, seed: int, *, vocab_size: int, order: int, concentration: float = 1.0, zeros: float = 0.0
    ) -> TabularModel:
        """Dirichlet rows; small `concentration` gives peaked ones. `zeros`: chance of each entry to be zero."""
        rng = np.random.default_rng(seed)
        table = rng.dirichlet(np.full(vocab_size, concentration), size=(vocab_size + 1) ** order) + 1e-12
        mask = rng.random(table.shape) < zeros
        mask[np.arange(len(table)), rng.integers(vocab_size, size=len(table))] = False
        table[mask] = 0.0
        return cls(table / table.sum(1, keepdims=True), order)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1]

    @property
    def start_context(self) -> int:
        """The context of the empty prefix."""
        return (self.vocab_size + 1) ** self.order - 1

    def after(self, context: int, token: int) -> int:
        """The context once `token` follows `context`."""
        base = self.vocab_size + 1
        return (context * base + token) % base**self.order

    def context(self, tokens: Tokens) -> int:
        """The context of a prefix."""
        context = self.start_context
        for token in tokens[max(len(tokens) - self.order, 0) :]:
            context = self.after(context, token)
        return context

    def log_row(self, context: int) -> tuple[np.ndarray, float, float]:
        """(log p(. | context) in nats, its entropy in nats, its margin)."""
        row = self._rows.get(context)
        if row is None:
            log_p, _ = self.tempered_row(context, 1.0)
            p = self.table[context]
            top = np.sort(p)[-2:]
            entropy = -float(np.dot(p[p > 0], log_p[p > 0]))
            row = self._rows[context] = (log_p, entropy, float(top[-1] - top[:-1].sum()))
        return row

    def tempered_row(self, context: int, exponent: Exponent) -> tuple[np.ndarray, float]:
        """(log q(. | context), log Z) for q = p^exponent / Z; exponent > 0. No token is left: (all -inf, -inf)."""
        row = self._memo.get((context, exponent))
        if row is None:
            e = exponent.exponent if isinstance(exponent, Without) else exponent
            with np.errstate(divide="ignore"):
                log_w = e * np.log(self.table[context])
            if isinstance(exponent, Without):
                log_w[[v for v in exponent.tokens if 0 <= v < self.vocab_size]] = -np.inf
            log_z = 0.0 if exponent == 1 else float(np.logaddexp.reduce(log_w))
            log_q = log_w - log_z if log_z > -np.inf else log_w
            row = self._memo[context, exponent] = (log_q, log_z)
        return row

    def branch(self, path: Path, cut: int) -> TabularRow:
        return TabularRow(self, self.context(path.tokens[:cut]))

    def score(self, path: Path, exponents: Sequence[Exponent]) -> Request:
        return Score(self, path, tuple(exponents))

    def answer(self, requests: Sequence[Extend[TabularRow] | Score]) -> list[Any]:
        return [self._extend(r) if isinstance(r, Extend) else self._score(r) for r in requests]

    def _extend(self, request: Extend[TabularRow]) -> Token:
        row, exponents = request.row, request.exponents
        log_q, log_z = self.tempered_row(row.context, exponents[0])
        log_p, entropy, margin = self.log_row(row.context)
        if log_z == -np.inf:
            return Token(-1, -np.inf, entropy, margin, (log_z,), slack=1.0, tokens_run=0)
        token = request.choices.categorical(log_q)
        others = tuple(self.tempered_row(row.context, e)[1] for e in exponents[1:])
        row.context = self.after(row.context, token)
        return Token(token, float(log_p[token]), entropy, margin, (log_z, *others), slack=1.0, tokens_run=1)

    def _score(self, request: Score) -> Path:
        path, context, n = request.path, self.start_context, len(request.path)
        log_p, entropy, margin = np.empty(n), np.empty(n), np.empty(n)
        log_z = {e: np.empty(n) for e in request.exponents}
        for t, token in enumerate(path.tokens):
            row, entropy[t], margin[t] = self.log_row(context)
            log_p[t] = row[token]
            for e, values in log_z.items():
                values[t] = self.tempered_row(context, e)[1]
            context = self.after(context, token)
        return path.with_scores(self, log_p, entropy, margin, log_z, None)


class TabularRow:
    """A prefix being extended; only its context matters."""

    __slots__ = ("context", "model")

    def __init__(self, model: TabularModel, context: int) -> None:
        self.model, self.context = model, context

    def extend(self, exponents: tuple[Exponent, ...], choices: Choices) -> Request:
        return Extend(self, exponents, choices)

    def cache(self) -> None:
        return None

    def release(self) -> None:
        pass

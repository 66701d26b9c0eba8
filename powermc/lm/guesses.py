"""Guesses of what a draft will say next, so that several of its tokens run in one pass.

A guess is run behind the last token; the draft then draws as ever, each token from the full model's own distribution
with its own number, and as long as it draws what was guessed the states are there. Speculative sampling (Leviathan et
al. 2023, arXiv:2211.17192) from a draft that is a point mass, done so that a guess changes cost and nothing else: not
the law, and not the tokens either. A pass of one row is bound by reading the weights, so that a few positions more cost
little; many rows are not, and guess less (`share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from powermc.lm.drafts import DecoderRow
    from powermc.lm.exits import EarlyExit

_LONGEST, _SHORTEST = 4, 2


def share(most: int, rows: int) -> int:
    """How many tokens each of `rows` rows may guess where one row alone may guess `most`."""
    return max((most + 1) // rows - 1, 0)


def lookup(ids: Sequence[int], texts: Sequence[Sequence[int]], most: int) -> tuple[int, ...]:
    """Up to `most` tokens that followed the last tokens of `ids` where those stood before.

    Looks for the last 4, then 3, then 2 tokens in each of `texts`, latest place first, and then in `ids` itself
    (prompt lookup, Saxena 2023).
    """
    for n in range(min(_LONGEST, len(ids)), _SHORTEST - 1, -1):
        last = tuple(ids[-n:])
        for text in (*texts, ids):
            for at in range(len(text) - n - 1, -1, -1):
                if text[at] == last[0] and tuple(text[at : at + n]) == last:
                    return tuple(text[at + n : at + n + most])
    return ()


class Guesser(Protocol):
    """Says what drafts may draw next."""

    @property
    def tokens(self) -> int:
        """How many tokens a row that decodes alone guesses."""
        ...

    def guess(self, rows: Sequence[DecoderRow], most: int) -> None:
        """Have each row guess up to `most` tokens (`DecoderRow.guess`). What is run for it is resumed."""
        ...


@dataclass(frozen=True)
class Lookup:
    """Guesses by `lookup` in the current path, in the latest drafts of the same prompt, and in the draft itself."""

    tokens: int = 7
    drafts: int = 8

    def guess(self, rows: Sequence[DecoderRow], most: int) -> None:
        for row in rows:
            latest = row.model.engine.pool.latest(row.prompt.ids, self.drafts)
            row.guess(lookup(row.ids, ((*row.prompt.ids, *row.path), *latest), most))


@dataclass(frozen=True)
class LikeliestAtExit:
    """Guesses the likeliest tokens at an early exit: layers [0, exit) one token after the other, the others at once."""

    exit: EarlyExit
    tokens: int = 3

    def guess(self, rows: Sequence[DecoderRow], most: int) -> None:
        engine, depth = self.exit.engine, self.exit.depth
        for _ in range(most):
            engine.rows.reserve(0, max(len(row.wanted) for row in rows))
            engine.run([(row.slot, row.wanted) for row in rows if row.slot is not None], depth)
            last = [engine.rows.hidden[depth][row.slot.index, len(row.wanted) - 1] for row in rows if row.slot]
            logits = self.exit.logits(torch.stack(last), np.full(len(last), -1))
            for row, token in zip(rows, logits.argmax(1).tolist(), strict=True):
                row.guess((*row.ahead, token))


class Counted:
    """Another guesser, with every row guessing as many tokens as one alone would; counts what is guessed, and right.

    rows: the most that decode side by side. A guess behind which a draft ended is counted as far as it was drawn.
    """

    def __init__(self, guesser: Guesser, rows: int) -> None:
        self._guesser, self._rows = guesser, rows
        self._open: dict[int, tuple[DecoderRow, int, tuple[int, ...]]] = {}
        self._guessed = self._right = 0

    @property
    def tokens(self) -> int:
        return (self._guesser.tokens + 1) * self._rows - 1  # `share` leaves that many to each row

    def guess(self, rows: Sequence[DecoderRow], most: int) -> None:
        for row in rows:
            self._close(row)
        self._guesser.guess(rows, min(most, self._guesser.tokens))
        for row in rows:
            self._open[id(row)] = (row, len(row.ids), tuple(row.ahead))

    def _close(self, row: DecoderRow) -> None:
        """Count the row's latest guess, which it has drawn beyond."""
        if id(row) not in self._open:
            return
        _, at, guess = self._open.pop(id(row))
        self._guessed += len(guess)
        drawn = row.ids[at : at + len(guess)]
        self._right += next((i for i, (u, v) in enumerate(zip(guess, drawn, strict=False)) if u != v), len(drawn))

    def counts(self) -> tuple[int, int]:
        """How many tokens were guessed, and how many of them were drawn. Rows are forgotten: ask when they are done."""
        for row, _, _ in list(self._open.values()):
            self._close(row)
        return self._guessed, self._right

"""A path being written, token by token, beyond a prefix of an existing one.

The states of a row's tokens come from three places: from what has been run of these very tokens before (the current
path, as long as the draft agrees with it; then the pool), from a slot of the buffer that the row takes once a token has
to run, and, ahead of the draft, from tokens guessed and run in the same pass (`powermc.lm.guesses`). Which one it was
changes no state and no draw: a guess that turns out wrong is as if it had not been made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from powermc.errors import NonFiniteLogits
from powermc.lm.pool import extended_key, key_of
from powermc.lm.rows import Prefix, Slot
from powermc.sequences.model import Exponent, Extend
from powermc.sequences.path import Path, Prompt, Tokens
from powermc.types import Choices, Request

if TYPE_CHECKING:
    from powermc.lm.oracle import DepthOracle


class DecoderRow:
    """The `Row` of a `DepthOracle`.

    Attributes
    ----------
    ids
        All tokens so far, the prompt's included.
    ahead
        Tokens that may come next: those that follow where `ids` was found, or guesses. A state at position
        len(ids) + i is that of ahead[:i + 1].
    logits
        Of the next positions, the first that of the next draw; dropped where a draw leaves `ahead`.
    """

    def __init__(self, model: DepthOracle, path: Path, cut: int) -> None:
        self.model, self.prompt = model, path.prompt
        self.ids = [*path.prompt.ids, *path.tokens[:cut]]
        self.path: Tokens = path.tokens
        self.ahead: Sequence[int] = ()
        self.logits: deque[torch.Tensor] = deque()
        self.slot: Slot | None = None
        self.prefix = known = model.engine.known(path, model.depth)
        if model.engine.reuse and known.reaches(model.depth) >= len(self.ids):
            self.ahead = path.tokens[cut:]
        else:
            self.prefix = known.upto(len(self.ids))
        self._key: int | None = None
        self._kept: Prefix | None = None

    def extend(self, exponents: tuple[Exponent, ...], choices: Choices) -> Request:
        return Extend(self, exponents, choices)

    def behind(self) -> int | None:
        """How many tokens the row must run before its next draw; it gets a slot if any. None: no slot is free."""
        depth, rows, n = self.model.depth, self.model.engine.rows, len(self.ids)
        if self.slot is None:
            if self.prefix.reaches(depth) >= n:
                return 0
            if not rows.free:
                return None
            self.prefix, self.ahead = self.prefix.upto(n), ()
            self.slot = rows.acquire(self.prefix, n)
        return max(n - self.slot.filled[depth], 0)

    def guess(self, tokens: Sequence[int]) -> None:
        """Run these tokens, in the next pass, behind the last one."""
        self.ahead = tuple(tokens)

    @property
    def wanted(self) -> list[int]:
        """The ids that the next pass should run up to."""
        return [*self.ids, *self.ahead]

    def states(self, most: int) -> torch.Tensor:
        """The states at the model's depth of the last position and of up to `most` - 1 ahead of it, (n, width)."""
        last, depth = len(self.ids) - 1, self.model.depth
        known = self.prefix.reaches(depth) if self.slot is None else self.slot.filled[depth]
        stop = min(last + most, known, last + 1 + len(self.ahead))
        if self.slot is None:
            return self.prefix.hidden(depth, last, stop)
        return self.model.engine.rows.hidden[depth][self.slot.index, last:stop]

    def append(self, token: int) -> None:
        """The next token, drawn."""
        if self._key is not None:
            self._key = extended_key(self._key, token)
        if self.ahead and self.ahead[0] == token:
            self.ahead = self.ahead[1:]
            self.logits.popleft()
            self.ids.append(token)
            return
        n, self.ahead = len(self.ids), ()
        self.logits.clear()
        self.ids.append(token)
        if self.slot is not None:
            for depth, filled in self.slot.filled.items():
                self.slot.filled[depth] = min(filled, n)
            return
        self.prefix = self.prefix.upto(n)
        if self.model.engine.reuse:
            self._key = key_of(self.ids) if self._key is None else self._key
            entry = self.model.engine.pool.find(self._key, self.ids, self.model.depth)
            if entry is not None:
                self.prefix, self.ahead = entry.prefix, entry.ids[n + 1 :]

    def fail(self, row: int) -> NonFiniteLogits:
        if self.slot is not None:
            self.slot.poisoned = True
        return non_finite(row, len(self.ids) - len(self.prompt.ids), self.prompt)

    def cache(self) -> Prefix:
        n = len(self.ids)
        if self.slot is None:
            return self.prefix.upto(n)
        for depth, filled in self.slot.filled.items():  # guesses were not drawn
            self.slot.filled[depth] = min(filled, n)
        if self._kept is None or self._kept.reaches(self.model.depth) < self.slot.filled[self.model.depth]:
            self._kept = self.model.engine.extended(self.prefix, self.slot, self.model.depth)
        return self._kept

    def release(self) -> None:
        engine = self.model.engine
        if self.slot is not None:
            if engine.reuse and not self.slot.poisoned:
                engine.pool.add(self.ids, self.prefix.length, self.cache())
            engine.rows.release(self.slot)
            self.slot = None


def non_finite(row: int, position: int, prompt: Prompt) -> NonFiniteLogits:
    """The error of logits that are NaN or infinite, at a position after the prompt."""
    shown = prompt.text if len(prompt.text) <= 40 else prompt.text[:37] + "..."
    return NonFiniteLogits(
        f"the model's logits are NaN or infinite in row {row} at position {position} after the prompt {shown!r}; "
        "this chain stops (try dtype float32, or check the checkpoint)"
    )

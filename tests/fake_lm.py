"""A language model without torch: a table with the interface of `powermc.CausalLM`, and faults on request."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from powermc.errors import ArgumentError, NonFiniteLogits
from powermc.lm.ledger import Ledger
from powermc.sequences import Path, Prompt, Space
from powermc.toy import TabularModel

PIECES = ("one ", "two ", "7", "[red]", "[/]", "\x1b[31m", "\u202e", "\n", "")
EOS = len(PIECES) - 1


class FakeLM(TabularModel):
    """Draws `PIECES`; the last is the end token. The law does not depend on the prompt, the random streams do.

    fail_at: numbers of token draws, counted from 0 over the whole run, that find NaN logits.
    interrupt_at: the number of the draw at which Ctrl-C is pressed.
    delay: seconds per batch.
    """

    def __init__(
        self,
        *,
        pieces: Sequence[str] = PIECES,
        seed: int = 0,
        context: int = 500,
        max_rows: int = 64,
        resolution: float = 0.0,
        fail_at: Iterable[int] = (),
        interrupt_at: int | None = None,
        delay: float = 0.0,
    ) -> None:
        table = np.random.default_rng(seed).dirichlet(np.full(len(pieces), 0.5), size=len(pieces) + 1)
        table[:, -1] *= 0.2  # paths of some length
        table = 0.97 * table / table.sum(1, keepdims=True) + 0.03 / len(pieces)
        super().__init__(table / table.sum(1, keepdims=True), 1, resolution)
        extra = {
            "pieces": tuple(pieces),
            "name": "fake",
            "context_length": context,
            "max_rows": max_rows,
            "ledger": Ledger(layers=2),
            "ignored_warpers": {"top_k": 50},
            "fail_at": frozenset(fail_at),
            "interrupt_at": math.inf if interrupt_at is None else interrupt_at,
            "delay": delay,
            "drawn": 0,
            "reserved": None,
            "widest": 0,
        }
        for name, value in extra.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:  # for type checkers: attributes set above
        raise AttributeError(name)

    def prompt(self, text: str, *, chat: bool | None = None) -> Prompt:
        ids = tuple((f"<user>{text}" if chat is not False else text).encode())
        return Prompt(ids, text, int.from_bytes(hashlib.blake2b(bytes(ids), digest_size=8).digest(), "little"))

    def space(self, horizon: int, stop: Sequence[str] = ()) -> Space:
        rule = (lambda tokens: any(s in self.decode(tokens) for s in stop)) if stop else None
        return Space(frozenset({len(self.pieces) - 1}), horizon, rule)

    def check_fits(self, prompt: Prompt, horizon: int) -> None:
        if len(prompt.ids) + horizon > self.context_length:
            raise ArgumentError(f"the prompt has {len(prompt.ids)} tokens; with {horizon} that exceeds the context")

    def reserve(self, rows: int, length: int) -> None:
        object.__setattr__(self, "reserved", (rows, length))

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.pieces[t] for t in tokens)

    def describe(self) -> dict[str, Any]:
        return {"architecture": "table", "layers": 2, "attach_deviation": 0.0}

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        answers, drawn = [], 0
        object.__setattr__(self, "widest", max(self.widest, len(requests)))
        for request in requests:
            if hasattr(request, "path"):
                self.ledger.ran((0, 2), len(request.path) + len(request.path.prompt.ids), parallel=True)
                answers.append(self._score(request))
                continue
            if self.drawn == self.interrupt_at:
                raise KeyboardInterrupt
            failed = self.drawn in self.fail_at
            answers.append(
                NonFiniteLogits("logits are NaN in row 0 at position 3") if failed else self._extend(request)
            )
            drawn += 1
            object.__setattr__(self, "drawn", self.drawn + 1)
        self.ledger.ran((0, 2), drawn, parallel=False)
        if self.delay:
            time.sleep(self.delay)
        return answers


def score(model: FakeLM, path: Path) -> float:
    """log p of a path, recomputed."""
    context, total = model.start_context, 0.0
    for token in path.tokens:
        total += math.log(model.table[context, token])
        context = model.after(context, token)
    return total

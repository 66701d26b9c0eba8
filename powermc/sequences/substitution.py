"""The substitution proposal: redraw some tokens inside the path and keep what follows them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from powermc.errors import ArgumentError
from powermc.sequences.drawing import DRAWN, draw, log_q
from powermc.sequences.model import Without, scored
from powermc.sequences.path import Cut, Path, Space
from powermc.sequences.routing import Models, model_at
from powermc.sequences.suffix import check_temperature
from powermc.types import Choices, Field, Fields, Move, Steps


@dataclass(frozen=True)
class Substitution:
    """Redraw the tokens [m, m + b) from q without end tokens, keep all others: blockwise Metropolis-Hastings proper.

    q(v | h) = p(v | h)^(1/temperature) / Z(h) for v not in `space.eos`, 0 for v in it, with Z(h) the sum of
    p(v | h)^(1/temperature) over the others. Let n be the number of positions that hold no end token: L - 1 if the last
    one does, else L. Then b = min(`tokens`, n), and m is uniform on 0..n-b. The move keeps L and n, so the law of m
    cancels, and

        log q(x | x') - log q(x' | x) = sum_{m <= t < m+b} [log q(x_t | x_<t) - log q(x'_t | x'_<t)].

    The density of the kept tail under its new prefix enters through the target alone: the proposed path is scored on
    its first m + b positions, and whoever needs more of it asks for the rest (one parallel pass over the kept tail).
    There is no early rejection: the b tokens drawn cost little, and what bounds the ratio of the rest is that pass.

    Reversible in a kernel as it is, but it never changes the length, so it needs a companion that does in a `Mixture`.

    Null moves: no position holds another than an end token; q has no token left at a drawn position (p is on end
    tokens alone there); q could not have drawn the current block; or the new tokens are no path of `space`, by a stop
    rule that now holds earlier, or at the end no longer (`outside`).

    Info: `cut` (m); `proposal_length` (tokens drawn); `tokens` (tokens run through the model); `near_ties` (draws that
    rounding could have changed); `proposed` (the tokens drawn, without the kept tail); `outside`. Raises
    `ArgumentError` for `tokens` below 1.
    """

    model: Models
    space: Space
    tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.tokens < 1:
            raise ArgumentError(f"a substitution redraws at least 1 token, got {self.tokens}")

    @property
    def fields(self) -> Fields:
        return {**DRAWN, "outside": Field("bool", False)}

    @property
    def law(self) -> Without:
        """The exponent key of q."""
        return Without(1.0 / self.temperature, self.space.eos)

    def propose(self, choices: Choices, value: Path) -> Steps[Move[Path]]:
        n = len(value) - (value.tokens[-1] in self.space.eos)
        if n == 0:
            return Move(value, value, null=True)
        b = min(self.tokens, n)
        m = choices.at("cut").integers(n - b + 1)
        cut = Cut(m, value.tokens[:m])
        model = model_at(self.model, cut)
        x = yield from scored(model, value, (self.law,), upto=m + b)
        if not self.log_q(x, m, m + b) > -math.inf:
            return Move(x, x, null=True, info={"cut": m})
        block = yield from draw(model, x, m, m + b, self.law, choices)
        tokens = block.tokens + x.tokens[m + b :]
        info = {"cut": m, **block.info()}
        if len(block.tokens) < m + b or not self.space.contains(tokens):
            return Move(x, x, null=True, info={**info, "outside": len(block.tokens) == m + b})
        y = block.onto(x, tokens, self.space.ends(tokens))
        log_hastings = self.log_q(x, m, m + b) - self.log_q(y, m, m + b)
        return Move(y, x, log_hastings, info=info, auxiliary=cut)

    def log_q(self, path: Path, m: int, stop: int) -> float:
        """log q of the tokens [m, stop) of `path`, given what comes before."""
        return log_q(path, self.law, m, stop)

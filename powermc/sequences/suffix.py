"""The suffix proposal: cut the path, redraw everything after the cut from the model at its own temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from powermc.errors import ArgumentError
from powermc.sequences.cuts import CutLaw, log_prob
from powermc.sequences.model import Autoregressive
from powermc.sequences.path import Path, Space
from powermc.types import Choices, Field, Fields, Move, Steps


def default_temperature(alpha: float) -> float:
    """min(1, 1/alpha): a proposal at least as wide as the target's own conditionals are sharp."""
    return 1.0 / alpha if alpha > 1 else 1.0


def check_temperature(temperature: float) -> None:
    """Raise `ArgumentError` unless the temperature is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ArgumentError(f"temperature must be a finite number > 0, got {temperature}")


def draft(
    model: Autoregressive, space: Space, path: Path, cut: int, temperature: float, choices: Choices
) -> Steps[tuple[Path, int, int]]:
    """Continue `path.tokens[:cut]` with tokens drawn from q until the path ends.

    q(. | h) = p(. | h)^(1/temperature) / Z(h). `path` must be scored, log Z at this temperature included, up to the
    cut. Returns the new path (fully scored), the number of tokens run through the model, and the number of draws
    that rounding could have changed.
    """
    assert path.log_p is not None, "a draft continues a scored path"
    exponent = 1.0 / temperature
    tokens = path.tokens[:cut]
    drawn: list[tuple[float, float, float]] = []
    ran = near_ties = 0
    finished = False
    row = model.branch(path, cut)
    try:
        while not finished and len(tokens) < space.horizon:
            token = yield row.extend((exponent,), choices.at("token", len(tokens)))
            tokens += (token.token,)
            drawn.append((token.log_p, token.entropy, token.log_z[0]))
            ran += token.tokens_run
            near_ties += token.slack < model.resolution
            finished = space.ends(tokens)
        cache = row.cache()
    finally:
        row.release()
    tail = np.array(drawn, dtype=np.float64).reshape(-1, 3)
    log_p, entropy, log_z = (
        np.concatenate((head[:cut], tail[:, i]))
        for i, head in enumerate((path.log_p, path.entropy, path.log_z[exponent]))
    )
    new = Path(path.prompt, tokens, finished).with_scores(model, log_p, entropy, {exponent: log_z}, cache)
    return new, ran, near_ties


@dataclass(frozen=True)
class Suffix:
    """Draw a cut m from C(m | x), keep x_<m, draw the rest from q at `temperature`.

    log q(x | x') - log q(x' | x) = sum_{t>=m} log q(x_t | x_<t) - sum_{t>=m} log q(x'_t | x'_<t)
    + log C(m | x') - log C(m | x), with log q_t = log p_t / temperature - log Z_t over *whole* tails. The temperature
    is independent of the target's alpha.

    A cut at or past the end of x, and a current tail that q could not have drawn, are null moves.

    Info: `cut`; `proposal_length` (tokens drawn); `tokens` (tokens run through the model); `near_ties` (draws that
    rounding could have changed).
    """

    model: Autoregressive
    space: Space
    cuts: CutLaw
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def fields(self) -> Fields:
        return {
            "cut": Field("int32", -1),
            "proposal_length": Field("int32", 0),
            "tokens": Field("int32", 0),
            "near_ties": Field("int32", 0),
        }

    def propose(self, choices: Choices, value: Path) -> Steps[Move[Path]]:
        exponent = 1.0 / self.temperature
        x = value.view(self.model)
        if x is None or not x.scored(self.model, (exponent,)):
            x = yield self.model.score(value, (exponent,))
        weights = self.cuts.log_weights(x)
        if not len(weights):
            return Move(x, x, null=True)
        m = self.cuts.start + choices.at("cut").categorical(weights)
        if m >= len(x) or not self.log_q(x, m) > -math.inf:
            return Move(x, x, null=True, info={"cut": m})
        y, ran, near_ties = yield from draft(self.model, self.space, x, m, self.temperature, choices)
        info = {"cut": m, "proposal_length": len(y) - m, "tokens": ran, "near_ties": near_ties}
        return Move(y, x, self.log_hastings(x, y, m), info=info)

    def log_hastings(self, x: Path, y: Path, m: int) -> float:
        """log q(x | y) - log q(y | x), in nats, for a move from x to y cut at m."""
        return self.log_q(x, m) - self.log_q(y, m) + log_prob(self.cuts, m, y) - log_prob(self.cuts, m, x)

    def log_q(self, path: Path, m: int) -> float:
        """log q of the tail of `path` from position m on, given what comes before."""
        exponent = 1.0 / self.temperature
        assert path.log_p is not None
        return float(exponent * path.log_p[m:].sum() - path.log_z[exponent][m:].sum())
